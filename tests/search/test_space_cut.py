"""The cut of a space: by tables and runtimes whose truth is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import autoprune
from autoprune.cli.main import main
from autoprune.config import StudyConfig
from autoprune.errors import UsageError
from autoprune.measure.truth_table import TruthTable, WidthTime, write_table
from autoprune.naming import StudyPaths
from autoprune.search import run
from autoprune.search.cost_model import CostModel
from autoprune.search.events import Progress
from autoprune.search.format_claims import Choice, claim_of
from autoprune.search.options import group_options, make_problem
from autoprune.search.space_cut import SpaceCut, cut_lines, cut_space, study_cut
from autoprune.search.timings import Timings
from autoprune.space.groups import Groups
from autoprune.space.search_space import SearchSpace
from autoprune.space.space_files import load_space, parse_space
from autoprune.space.space_parts import Override
from autoprune.study.store import StudyStore
from autoprune.target import Target
from tests.measure.test_truth import entry, table
from tests.search.fakes import make_groups
from tests.search.test_cost_model import SPACE, make_model
from tests.search.test_end_to_end import digits, trained

ALL = ("accuracy", "latency", "size")
FAST = ("accuracy", "latency")
GROUPS = make_groups()  # three convolutions and a linear head
HERE = Target()
ELSEWHERE = Target.model_construct(**{**Target().model_dump(), "runtime": "another"})


def bits_of(space: SearchSpace, groups: Groups = GROUPS) -> dict[str, tuple[int, ...]]:
    return {g.name: space.bits_of(g) for g in groups.groups}


def cut(
    space: SearchSpace,
    objectives: tuple[str, ...] = ALL,
    known: TruthTable | None = None,
    target: Target = HERE,
) -> tuple[SearchSpace, SpaceCut]:
    found = cut_space(space, GROUPS, target, objectives, known)
    return found.applied(space, GROUPS), found


def low(*bits: int, **more: Any) -> SearchSpace:
    return SearchSpace.model_validate({"bits": bits, **more})


# -- without a table -------------------------------------------------------------------------


def test_the_shipped_default_is_searched_as_it_is() -> None:
    for name in ("default", "structured", "int8", "quick"):
        for objectives in (ALL, FAST):
            space = load_space(name)
            found, told = cut(space, objectives)
            assert found is space
            assert told == SpaceCut()


def test_bits_that_only_save_bytes_stay_where_size_is_an_objective_and_are_told() -> None:
    space = low(2, 4, 8, 16, 32)
    found, told = cut(space)
    assert found is space
    assert told.lines[:2] == (
        "bits 16 of conv and linear layers save bytes, not time: they run in float32 all the same",
        "bits 2, 4 of conv and linear layers save bytes, not time: they run in int8 as more bits do, no faster",
    )
    assert "doctor --measure" in told.lines[2] and "onnxruntime" in told.lines[2]


def test_they_are_left_out_where_it_is_none() -> None:
    found, told = cut(low(2, 4, 8, 16, 32), FAST)
    assert set(bits_of(found).values()) == {(8, 32)}
    assert found.bits == (8, 32)
    assert [line.split(":")[0] for line in told.lines[:2]] == ["left out", "left out"]


def test_of_bits_that_run_alike_the_most_stay() -> None:
    assert cut(low(4, 6), FAST)[0].bits == (6,)
    assert cut(low(4, 32), FAST)[0].bits == (4, 32)
    assert cut(low(16, 32), FAST)[0].bits == (32,)
    assert cut(low(4), FAST)[0].bits == (4,)


def test_weights_that_a_kernel_reads_in_few_bits_are_told_from_those_that_none_reads() -> None:
    space = low(4, 6, 32, activation_bits=(32,))
    found, told = cut(space, FAST)
    assert bits_of(found) == {"conv0": (32,), "conv1": (32,), "conv2": (32,), "head": (4, 32)}
    assert told.lines[:2] == (
        "left out: bits 4, 6 of conv layers with inputs of 32 bits: they run in float32 all the same",
        "left out: bits 6 of linear layers with inputs of 32 bits: they run in float32 all the same",
    )
    read = cut(space, FAST, target=Target(runtime="openvino"))[0]
    assert bits_of(read)["head"] == (4, 6, 32)  # 6 bits are read as 8 there, 4 as 4


def test_inputs_that_no_format_gains_by_are_left_out() -> None:
    assert cut(low(8, 32, activation_bits=(8, 32)), ALL)[0].activation_bits == (8, 32)
    # Linear layers of 8 bits are read so by a kernel.
    assert cut(low(8, 32, activation_bits=(8, 32)), FAST)[0].activation_bits == (8, 32)
    assert cut(low(6, 32, activation_bits=(8, 32)), FAST)[0].activation_bits == (8,)


def test_overrides_are_cut_too_and_keep_what_else_they_say() -> None:
    space = low(8, 32, overrides=[{"groups": "conv*", "bits": [4, 8], "ratios": [0.0, 0.5]}])
    found, _ = cut(space, FAST)
    assert bits_of(found) == {"conv0": (8,), "conv1": (8,), "conv2": (8,), "head": (8, 32)}
    assert all(found.ratios_of(g) == (0.0, 0.5) for g in GROUPS.groups if g.name.startswith("conv"))


def test_masks_are_left_out_where_only_time_counts() -> None:
    space = low(8, 32, sparsities=(0.0, 0.5), overrides=[{"groups": "head", "sparsities": [0.9]}])
    found, told = cut(space, FAST)
    assert found.every_sparsity == (0.0,)
    assert told.lines[0].startswith("left out: sparsities above 0")
    kept, told = cut(space, ALL)
    assert kept is space
    assert told.lines[0].startswith("sparsities above 0 save bytes, not time")


def test_nothing_is_cut_for_a_runtime_of_which_nothing_is_known() -> None:
    space = low(2, 4, 8, 16, 32, sparsities=(0.0, 0.5))
    assert cut(space, FAST, target=ELSEWHERE) == (space, SpaceCut())


# -- with a table ----------------------------------------------------------------------------


def measured(*rows: tuple[str, int, int, dict[str, int], tuple[float, float] | None]) -> TruthTable:
    """Return a table of ``(operator, bits, inputs, ran, interval)``; convolutions have a name that begins so."""
    return table(
        entries=tuple(
            entry(
                operator=operator,
                kind="conv" if operator.startswith("conv") else "linear",
                format=f"{bits}/{inputs}",
                bits=bits,
                activation_bits=inputs,
                ran=ran,
                real="float32" not in ran,
                ratio=None if interval is None else sum(interval) / 2,
                ratio_ci=interval,
                refused="" if interval else "it has none",
            )
            for operator, bits, inputs, ran, interval in rows
        )
    )


EIGHT = {"int8": 3}


def test_int8_that_is_slower_here_is_left_out_for_the_layers_that_it_slows() -> None:
    known = measured(
        ("conv 3x3", 8, 8, EIGHT, (0.3, 0.4)),
        ("conv depthwise", 8, 8, EIGHT, (1.3, 1.4)),
        ("linear", 8, 8, EIGHT, (1.1, 1.2)),
    )
    found, told = cut(low(8, 32), FAST, known)
    # One operator that gains is enough: which ones a network has is the search's to find out.
    assert bits_of(found) == {"conv0": (8, 32), "conv1": (8, 32), "conv2": (8, 32), "head": (32,)}
    assert told.lines == (
        "left out: bits 8 of linear layers: they run in int8, no faster than more bits do",
        "measured here on 2026-11-26",
    )
    assert cut(low(8, 32), ALL, known)[0] == low(8, 32)


def test_fewer_bits_need_an_interval_of_their_own() -> None:
    rows = [
        ("linear", 8, 32, {"8 bit weights": 3}, (0.5, 0.6)),
        ("linear", 4, 32, {"4 bit weights": 3}, (0.45, 0.55)),
    ]
    space = low(4, 8, 32, activation_bits=(32,))
    assert bits_of(cut(space, FAST, measured(*rows))[0])["head"] == (8, 32)
    rows[1] = ("linear", 4, 32, {"4 bit weights": 3}, (0.3, 0.4))
    assert bits_of(cut(space, FAST, measured(*rows))[0])["head"] == (4, 8, 32)


def test_the_same_kernel_is_no_gain_however_lucky_an_interval_is() -> None:
    rows = [("conv", bits, 8, EIGHT, (low_end, low_end + 0.05)) for bits, low_end in ((8, 0.5), (4, 0.3))]
    found, told = cut(low(4, 8, 32), FAST, measured(*rows))
    assert bits_of(found)["conv0"] == (8, 32)
    assert (
        told.lines[0]
        == "left out: bits 4 of conv and linear layers: they run in int8 as more bits do, no faster"
    )


def test_storage_that_was_timed_as_faster_by_chance_gets_no_credit() -> None:
    known = measured(("conv", 16, 32, {"float32": 3}, (0.8, 0.9)))
    assert bits_of(cut(low(16, 32), FAST, known)[0])["conv0"] == (32,)


def test_what_the_runtime_refuses_is_left_out_whatever_the_objectives() -> None:
    known = measured(("conv", 8, 8, {}, None), ("linear", 8, 8, EIGHT, (0.3, 0.4)))
    found, told = cut(low(8, 32), ALL, known, ELSEWHERE)
    assert bits_of(found) == {"conv0": (32,), "conv1": (32,), "conv2": (32,), "head": (8, 32)}
    assert told.lines[0] == "left out: bits 8 of conv layers: it has none"


def test_bits_that_were_not_measured_are_taken_for_those_that_run_alike() -> None:
    known = measured(("conv", 8, 8, EIGHT, (0.3, 0.4)), ("conv", 4, 8, {"int4": 3}, (0.1, 0.2)))
    six = claim_of(Choice("conv", 6, 8), HERE, known)
    assert six is not None and six.speeds == {"conv": (0.3, 0.4)}
    three = claim_of(
        Choice("conv", 3, 8), ELSEWHERE, known
    )  # of which nothing else is known: the next more bits
    assert three is not None and three.speeds == {"conv": (0.1, 0.2)}
    assert claim_of(Choice("conv", 16, 32), ELSEWHERE, known) is None


def test_zeros_that_are_skipped_here_stay() -> None:
    sparse = {
        "bits": 32,
        "activation_bits": 32,
        "sparsity": 0.9,
        "format": "sparse 0.9",
        "ran": {"sparse": 3},
    }
    space = low(8, 32, sparsities=(0.0, 0.9))
    assert cut(space, FAST, table(entries=(entry(**sparse),)))[0].every_sparsity == (0.0, 0.9)
    slow = {**sparse, "real": False, "ran": {"float32": 3}}
    assert cut(space, FAST, table(entries=(entry(**slow),)))[0].every_sparsity == (0.0,)


# -- width -----------------------------------------------------------------------------------


def widths(step: int) -> tuple[WidthTime, ...]:
    return tuple(
        WidthTime(operator="conv", kind="conv", format="float", channels=c, ratio=-(-c // step) * step / 80,
                  ratio_ci=(0.1, 2.0))
        for c in (48, 56, 60, 63, 64, 68, 72, 80)
    )  # fmt: skip


def test_width_auto_is_what_was_measured_and_the_usual_one_without() -> None:
    space = parse_space("width: auto\nbits: [8, 32]")
    assert space.has_automatic_width and space.width == 8
    found, told = cut(space, ALL, table(widths=widths(16)))
    assert (found.width, found.has_automatic_width) == (16, False)
    assert told.lines == ("width 16: counts between its multiples are no faster here (2026-11-26)",)
    found, told = cut(space)
    assert (found.width, found.has_automatic_width) == (8, False)
    assert told.lines[0].startswith("width 8: nothing was measured") and "doctor --measure" in told.lines[0]


def test_a_width_that_is_given_is_left_alone() -> None:
    space = parse_space("width: 4")
    assert cut(space, ALL, table(widths=widths(16)))[0] is space
    assert space.content() != parse_space("width: auto").content() != parse_space("width: 8").content()


@pytest.mark.parametrize("value", ["automatic", "0", "2000", "8.5", "[8]"])
def test_other_widths_are_refused_with_what_is_allowed(value: str) -> None:
    with pytest.raises(UsageError, match=r"search space:1: width = .*(auto|1024|1|integer)"):
        parse_space(f"width: {value}")


# -- of a study ------------------------------------------------------------------------------


def open_study(name: str = "s") -> StudyStore:
    config = StudyConfig.model_validate({"model": "m", "data": "d", "study": name})
    return StudyStore.create_or_resume(config, StudyPaths.of(name))


def config_of(**more: Any) -> StudyConfig:
    return StudyConfig.model_validate({"model": "m", "data": "d", "objectives": FAST, **more})


def test_a_study_keeps_the_cut_that_it_began_with() -> None:
    store, space = open_study(), low(4, 8, 32)
    first = study_cut(store, space, GROUPS, config_of())
    assert first.applied(space, GROUPS).bits == (8, 32)
    write_table(measured(("conv", 8, 8, EIGHT, (1.3, 1.4))), HERE)
    assert study_cut(store, space, GROUPS, config_of()) == first
    assert cut_lines(store.notes()) == first.lines != ()
    fresh = study_cut(open_study("t"), space, GROUPS, config_of())
    assert bits_of(fresh.applied(space, GROUPS))["conv0"] == (32,)


def test_a_search_says_what_it_leaves_out_and_searches_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        """The driver would begin."""

    def driver(store: StudyStore, space: SearchSpace, *rest: object, **more: object) -> None:
        raise Reached(space)

    monkeypatch.setattr(run, "Driver", driver)
    monkeypatch.setattr(run, "build_bench", lambda *_: SimpleNamespace(timings=Timings()))
    (tmp_path / "s.yaml").write_text("bits: [4, 8, 32]\nwidth: auto\n")
    write_table(measured(("conv", 8, 8, EIGHT, (0.3, 0.4))).model_copy(update={"widths": widths(16)}), HERE)
    events: list[Progress] = []
    with pytest.raises(Reached) as reached:
        autoprune.search(trained(), digits(), "1trials", study="t", space=str(tmp_path / "s.yaml"),
                         objectives=FAST, progress=events.append)  # fmt: skip
    (space,) = reached.value.args
    assert (space.bits, space.width) == ((8, 32), 16)
    assert [e.message.split(":")[0] for e in events if e.phase == "space"] == [
        "left out", "measured here on 2026-11-26", "width 16",
    ]  # fmt: skip


def test_a_dry_run_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.yaml").write_text("bits: [4, 8, 32]\n")
    words = [
        "search",
        "--model",
        "cifar_resnet20",
        "--data",
        "digits",
        "--space",
        str(tmp_path / "s.yaml"),
        "--quiet",
    ]
    assert main([*words, "--objectives", "accuracy,latency", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["brings_no_time"][0].startswith("left out: bits 4 of conv and linear layers")
    assert main([*words, "--dry-run", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["brings_no_time"][0].startswith("bits 4 of conv and linear layers save bytes")
    assert plan["log10_recipes"] < whole["log10_recipes"]


def test_a_study_of_an_earlier_version_goes_on_uncut() -> None:
    store, space = open_study(), low(4, 8, 32)
    store.ask()
    assert study_cut(store, space, GROUPS, config_of()) == SpaceCut()
    assert cut_lines(store.notes()) == ()


def test_names_of_groups_with_signs_of_patterns_are_taken_literally(
    make_groups: Callable[..., Groups],
) -> None:
    groups = make_groups(**{"a[0]": ("conv", 8, True), "a0": ("linear", 8, True)})
    found = SpaceCut(bits={"a[0]": (8,)}).applied(low(8, 32), groups)
    assert bits_of(found, groups) == {"a[0]": (8,), "a0": (8, 32)}
    assert isinstance(found.overrides[0], Override)


# -- predictions -----------------------------------------------------------------------------


def test_what_only_saves_bytes_is_predicted_to_take_the_time_of_what_it_runs_as() -> None:
    """No latency credit in the solver's tables either."""
    model, groups = make_model()
    kept = {g.name: g.size for g in groups.groups}
    for stored, runs_as in ((16, 32), (4, 8), (2, 8), (6, 8)):
        for name in kept:
            assert model.latency(kept, {name: stored}) == model.latency(kept, {name: runs_as})
        assert model.size(kept, {"c": stored}) < model.size(kept, {"c": runs_as})


def test_integers_that_are_only_stored_here_are_predicted_to_take_the_time_of_float() -> None:
    """Designs of int8 were timed, so the noise of their times would tell them apart."""
    known = measured(("conv", 8, 8, {"float32": 3}, (0.8, 0.9)), ("linear", 8, 8, EIGHT, (0.3, 0.4)))
    assert cut(low(8, 32), ALL, known)[1].in_float == ("conv0", "conv1", "conv2")
    assert cut(low(8, 32))[1].in_float == ()
    noisy, groups = make_model()
    kept = {g.name: g.size for g in groups.groups}
    model = CostModel(noisy.shapes, noisy.designs, in_float=("b", "c"))
    for one, other in (({"b": 8}, {}), ({"b": 8, "c": 8}, {}), ({"a": 8, "b": 8}, {"a": 8})):
        assert model.latency(kept, one) == model.latency(kept, other) != noisy.latency(kept, one)
        assert model.size(kept, one) < model.size(kept, other)
    assert model.latency(kept, {"a": 8}) < model.latency(kept, {})


@pytest.mark.parametrize("in_float", [(), ("b",), ("b", "c")])
def test_the_solver_s_tables_say_what_the_model_says(in_float: tuple[str, ...]) -> None:
    noisy, groups = make_model()
    model = CostModel(noisy.shapes, noisy.designs, in_float=in_float)
    model._line[-1] = 1e-5  # these designs change types for free
    kept = {g.name: g.size for g in groups.groups}
    options = tuple(group_options(g, SPACE, [], {}, 1e-3) for g in groups.groups)
    problem = make_problem(options, model)
    for chosen in itertools.product((8, 32), repeat=len(options)):
        rows = [of.bits.index(b) for of, b in zip(options, chosen, strict=True)]
        total = problem.base_latency + sum(t[row] for t, row in zip(problem.latency, rows, strict=True))
        total += sum(pair.latency[rows[pair.first], rows[pair.second]] for pair in problem.pairs)
        assert total == pytest.approx(model.latency(kept, dict(zip(kept, chosen, strict=True))))
