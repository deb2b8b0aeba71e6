"""Measuring the profile: what the time allowed holds, the most telling entries first, and kept for later."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from autoprune.compress.pipeline import Compressed
from autoprune.compress.sensitivity import SensitivityMeter
from autoprune.compress.shapes import layer_shapes
from autoprune.compress.surgery import prune
from autoprune.errors import TrialError
from autoprune.measure.cost import size_bytes
from autoprune.measure.figures import NO_RUN
from autoprune.measure.host import describe_host
from autoprune.measure.latency import PROFILE_PROTOCOL, measure_front
from autoprune.measure.node_times import layer_seconds
from autoprune.naming import cache_root
from autoprune.search.bench import Bench
from autoprune.search.designs import design_recipes
from autoprune.search.profile import CutLoss, Design, Profile, read_profile, write_profile
from autoprune.search.trial import failures_as_trial_errors
from autoprune.space.groups import Group, Groups, kept_count
from autoprune.space.quantization import INTEGER_BITS, Quantization
from autoprune.space.recipe import Recipe, Recovery
from autoprune.space.search_space import SearchSpace
from autoprune.workloads.weights import state_digest

_FORMAT = 3
_EXAMPLES = 256
_BATCH = 64
# The share of the time for losses; the rest goes into exported networks.
_LOSS_SHARE = 0.6
# Networks that are exported whatever it costs: the dense one, and what a cost model cannot do without.
_LEAST_DESIGNS = 3
# What a loss that became infinite, or no number, counts as: so many times the dense loss + 1.
_RUINED = 100.0
# Stands for a criterion where a group's bit-width is meant.
_BITS = "bits"
_log = logging.getLogger(__name__)

Say = Callable[[str], None]


def measure_profile(
    bench: Bench, space: SearchSpace, allowed_s: float, say: Say, stop: Callable[[], bool] = lambda: False
) -> Profile:
    """Return the profile of the bench's network, measured within ``allowed_s`` seconds.

    What an earlier run measured of the same network, data and target is taken from the cache and completed.

    Args:
        bench: What the study shares; its dense artifact has to be there.
        space: What may be tried.
        allowed_s: Seconds to spend. A step that began is ended, and a few networks are always exported.
        say: Gets a line now and then.
        stop: Whether to end at once.
    """
    begun = time.perf_counter()
    place = cache_root() / "profiles" / f"{profile_key(bench, space)}.json"
    profile = read_profile(place)
    known = profile.seconds if profile is not None else 0.0

    def left_s(share: float = 1.0) -> float:
        return -1.0 if stop() else share * allowed_s - (time.perf_counter() - begun)

    if profile is None:
        shapes = layer_shapes(bench.workload.model, bench.groups, bench.calibration[0][0][:2])
        profile = Profile(dense_loss=0.0, examples=0, shapes=shapes)
    profile = _with_losses(profile, bench, space, lambda: left_s(_LOSS_SHARE), say)
    profile = _with_designs(profile, bench, space, left_s, say)
    profile = profile.model_copy(update={"seconds": known + time.perf_counter() - begun})
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_profile(place, profile)
    except OSError as error:
        _log.warning("the profile could not be cached in %s: %s", place, error)
    return profile


def profile_key(bench: Bench, space: SearchSpace) -> str:
    """Return a name for all that the profile depends on: network, data, target, machine and recovery."""
    recovery, own = space.default_recovery(), space.quantization.default()
    host = describe_host()
    content = [
        _FORMAT,
        state_digest(bench.workload.model),
        bench.groups.model_dump_json(),
        bench.workload.data.fingerprint,
        bench.config.seed,
        bench.config.calibration_examples,
        bench.config.target.model_dump(mode="json"),
        [recovery.least_squares, recovery.batchnorm, _distils(bench, recovery)],
        *([] if own == Quantization() else [own.content()]),
        list(bench.workload.data.input_shape),
        [host["processor"], host["flags"], host["versions"].get(bench.config.target.runtime)],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


# -- losses ----------------------------------------------------------------------------------


def _with_losses(
    profile: Profile, bench: Bench, space: SearchSpace, left_s: Callable[[], float], say: Say
) -> Profile:
    """Measure losses in the order of :func:`_wanted`; what there is no time for is estimated."""
    cuts = {(c.group, c.kept, c.criterion): c for c in profile.cuts if c.measured}
    known = _known_bits(profile)
    wanted = list(_wanted(bench.groups, space))
    if all(key in cuts or (key[2] == _BITS and key[:2] in known) for key in wanted):
        return profile
    unseen = list(bench.workload.data.search.batches(_BATCH, limit=_EXAMPLES))
    recovery = space.default_recovery()
    meter = SensitivityMeter(
        bench.workload.model,
        bench.groups,
        bench.statistics,
        bench.calibration,
        unseen,
        loss=bench.workload.loss,
        recovery=recovery,
        distils=_distils(bench, recovery),
        device=bench.device,
        quantization=space.quantization.default(),
        int8_bits=bench.int8_bits,
    )
    for done, (group, kept, kind) in enumerate(wanted):
        if left_s() <= 0:
            break
        if kind == _BITS:
            if (group, kept) not in known:
                known[group, kept] = _finite(meter.of_bits(group, kept), meter.dense_loss)
        elif (group, kept, kind) not in cuts:
            growth = _finite(meter.of_cut(group, kept, kind), meter.dense_loss)
            cuts[group, kept, kind] = CutLoss(
                group=group, kept=kept, criterion=kind, growth=growth, measured=True
            )
        if done % 20 == 19:
            say(f"profile: loss of {done + 1} of {len(wanted)} choices")
    everything = [cuts.get(key) or _estimated(meter, cuts, *key) for key in wanted if key[2] != _BITS]
    asked = set(wanted)
    everything += [cut for key, cut in cuts.items() if key not in asked]  # another space's, kept for it
    examples = sum(len(inputs) for inputs, _ in unseen)
    return profile.model_copy(
        update={
            "measure": "divergence" if meter.compares_outputs else "loss",
            "dense_loss": meter.dense_loss,
            "examples": examples,
            "cuts": tuple(everything),
            "int8": {group: growth for (group, bits), growth in known.items() if bits == INTEGER_BITS},
            "fewer_bits": _by_group({key: growth for key, growth in known.items() if key[1] < INTEGER_BITS}),
        }
    )


def _known_bits(profile: Profile) -> dict[tuple[str, int], float]:
    """Return the growths by group and bit-width that a profile holds."""
    fewer = {(name, b): loss for name, by in profile.fewer_bits.items() for b, loss in by.items()}
    return {**fewer, **{(name, INTEGER_BITS): growth for name, growth in profile.int8.items()}}


def _by_group(growths: dict[tuple[str, int], float]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for (group, bits), growth in growths.items():
        found.setdefault(group, {})[bits] = growth
    return found


def _distils(bench: Bench, recovery: Recovery) -> bool:
    return recovery.distill > 0 and bench.workload.training_step is None


def _finite(growth: float, dense_loss: float) -> float:
    """Return a growth of the loss; a loss that is not finite has grown more than any other."""
    return growth if math.isfinite(growth) else _RUINED * (dense_loss + 1.0)


def _wanted(groups: Groups, space: SearchSpace) -> Iterator[tuple[str, int, str]]:
    """Yield ``(group, kept, criterion)`` and ``(group, bits, "bits")``, what tells most first.

    One width in the middle of every group and its bit-widths, then its deepest cut, then the other widths, all by the
    first criterion; then the others in the same order. Blocks are removed once, criteria do not tell them apart.
    """
    by_group = {g.name: _widths(g, space) for g in groups.groups}
    deepest = max((len(widths) for widths in by_group.values()), default=0)
    criteria = {g.name: space.criteria[g.type] for g in groups.groups}
    for turn in range(max((len(names) for names in criteria.values()), default=0)):
        for place in range(deepest):
            for group in groups.groups:
                widths = by_group[group.name]
                if turn == 0 and place == 0:
                    yield from ((group.name, b, _BITS) for b in space.bits_of(group) if b <= INTEGER_BITS)
                # Criteria do not tell apart how a whole block is removed.
                wanted = place < len(widths) and (turn == 0 or widths[place] > 0)
                if wanted and turn < len(criteria[group.name]):
                    yield group.name, widths[place], criteria[group.name][turn]


def _widths(group: Group, space: SearchSpace) -> list[int]:
    """Return the kept counts of a group: the one in the middle, the smallest, then the rest."""
    counts = sorted({kept_count(group.size, r, space.width) for r in space.ratios_of(group)} - {group.size})
    if not counts:
        return []
    first = [counts[len(counts) // 2], counts[0]]
    return list(dict.fromkeys([*first, *counts]))


def _estimated(
    meter: SensitivityMeter,
    cuts: dict[tuple[str, int, str], CutLoss],
    group: str,
    kept: int,
    criterion: str,
) -> CutLoss:
    """Return a loss that was not measured: the gradient's estimate, brought to the height of what was.

    The height is that of the measured width nearest by, of the same criterion if there is one, else of any; with none
    in the group, of the other groups in the median.
    """
    estimate = meter.estimate(group, kept, criterion)
    own = [c for c in cuts.values() if c.group == group]
    alike = [c for c in own if c.criterion == criterion] or own
    pool = sorted(alike, key=lambda c: abs(c.kept - kept))[:1] or list(cuts.values())
    heights = sorted(
        max(c.growth, 0.0) / guess
        for c in pool
        if (guess := meter.estimate(c.group, c.kept, c.criterion)) > 0
    )
    scale = heights[len(heights) // 2] if heights else 1.0
    growth = _finite(estimate * scale, meter.dense_loss)
    return CutLoss(group=group, kept=kept, criterion=criterion, growth=growth, measured=False)


# -- exported networks -----------------------------------------------------------------------


def _with_designs(
    profile: Profile, bench: Bench, space: SearchSpace, left_s: Callable[[], float], say: Say
) -> Profile:
    """Export and time networks that cover widths and bits, as many as there is time for."""
    known = [(design.kept, design.bits) for design in profile.designs]
    plans = design_recipes(bench.groups, space, bench.config.seed)
    fresh = [
        recipe for recipe in plans if (recipe.kept_counts(bench.groups), _bits(recipe, bench)) not in known
    ]
    if bench.dense is None:
        raise RuntimeError("a profile needs the dense artifact, which trial 0 builds")
    folder = Path(tempfile.mkdtemp(prefix="autoprune-profile-"))
    built: list[tuple[Recipe, Path]] = []
    slowest_s = 0.0
    try:
        for number, recipe in enumerate(fresh):
            # Timing what was built comes after, and takes about as long.
            needed = len(profile.designs) + len(built) < _LEAST_DESIGNS
            if not needed and left_s() < 2 * slowest_s + 0.8 * len(built):
                break
            begun = time.perf_counter()
            say(f"profile: exporting network {number + 1} of {len(fresh)}")
            path = folder / f"{number}"
            path.mkdir()
            try:
                built.append((recipe, _export(bench, recipe, path)))
            except TrialError as error:
                if not recipe.groups:  # without the dense network there is nothing to compare with
                    raise
                _log.warning("a network of the profile is left out: %s", error)
            slowest_s = max(slowest_s, time.perf_counter() - begun)
        if not built:
            return profile
        say(f"profile: timing {len(built)} networks")
        designs = _timed(bench, profile, built)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return profile.model_copy(update={"designs": (*profile.designs, *designs)})


def _export(bench: Bench, recipe: Recipe, folder: Path) -> Path:
    if bench.dense is not None and not recipe.groups:
        return bench.dense.path
    counts = recipe.kept_counts(bench.groups)
    # Speed does not depend on which units stay.
    plan = {g.name: tuple(range(counts[g.name])) for g in bench.groups.groups if counts[g.name] < g.size}
    model = prune(bench.workload.model, bench.groups, plan).eval()
    with failures_as_trial_errors():
        bench.deploy(Compressed(model), recipe, folder)
    return folder / bench.model_file


def _bits(recipe: Recipe, bench: Bench) -> dict[str, int]:
    return {g.name: recipe.choice(g.name).bits for g in bench.groups.groups}


def _timed(bench: Bench, profile: Profile, built: list[tuple[Recipe, Path]]) -> list[Design]:
    if bench.dense is None:
        raise RuntimeError("a profile needs the dense artifact, which trial 0 builds")
    paths = [path for _, path in built]
    shape, target = bench.workload.data.input_shape, bench.config.target
    layers = [s.name for s in profile.shapes]
    by_layer = layer_seconds(paths, layers, target, shape)
    whole = measure_front(paths, bench.dense.path, target, shape, protocol=PROFILE_PROTOCOL, run=NO_RUN)
    return [
        Design(
            kept=recipe.kept_counts(bench.groups),
            bits=_bits(recipe, bench),
            layer_s=seconds,
            size_bytes=size_bytes(path),
            latency_ratio=latency.ratio,
        )
        for (recipe, path), seconds, (latency, _) in zip(built, by_layer, whole, strict=True)
    ]
