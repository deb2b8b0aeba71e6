"""What cases call instead of the command line: one stage alone, with the command line's treatment of errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoprune.cli import main as command_line
from tests.fuzz.zygote import replaced


def told(function: Callable[[], Any]) -> int:
    """Run a function as a verb: what it raises becomes one message and an exit code."""

    def app(**_: Any) -> int:
        function()
        return 0

    before = replaced("autoprune.cli.main.app", app)
    try:
        return command_line.main([])
    finally:
        replaced("autoprune.cli.main.app", before)


def settings(path: str) -> int:
    """Read a file of settings."""
    from autoprune.cli.settings import gather
    from autoprune.search.limits import check_space
    from autoprune.space.space_files import load_space
    from autoprune.workloads.catalog import check_inputs

    def read() -> None:
        found = gather(Path(path), {})
        check_space(found, load_space(found.space))
        check_inputs(found)

    return told(read)


def space(path: str) -> int:
    """Read a search space, and draw from it as far as the groups of a network allow."""
    from autoprune.cli.settings import gather
    from autoprune.search.limits import check_space
    from autoprune.space.space_files import load_space
    from tests.report.studies import groups

    def read() -> None:
        found = load_space(path)
        check_space(gather(None, {"model": "cifar_resnet20", "sampler": "tpe"}), found)
        network = groups()
        found.check(network)
        found.size(network)

    return told(read)


def recipe(path: str) -> int:
    """Read a recipe."""
    from autoprune.cli.searching import _read_recipe
    from tests.report.studies import groups

    def read() -> None:
        found = _read_recipe(Path(path), [])
        found.check(groups())
        found.kept_counts(groups())

    return told(read)


def weights(path: str) -> int:
    """Put the weights of a file into a network."""
    import torch

    from autoprune.workloads.catalog import check_weights_name
    from autoprune.workloads.weights import apply_state, load_state

    def read() -> None:
        check_weights_name(path)
        model = torch.nn.Module()
        model.register_buffer("w", torch.zeros(192, 4))
        model.register_buffer("b", torch.zeros(4))
        apply_state(model, load_state(Path(path)), path)

    return told(read)


def program(path: str) -> int:
    """Read a .pt2 file and run it once."""
    import torch

    from autoprune.deploy.sessions.torch import open_session
    from autoprune.target import Target

    def read() -> None:
        session = open_session(Target(runtime="torch"), Path(path), 1)
        session.run(torch.zeros(session.fixed_batch or 2, 3, 8, 8).numpy())

    return told(read)


def measure(folder: str) -> int:
    """Measure an artifact on a few made-up images, up to where timing would begin."""
    import torch

    from autoprune.workloads.objects import data_from_objects
    from autoprune.workloads.splitting import Limits

    def few(*_: Any, **__: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.randn(80, 3, 8, 8, generator=generator), torch.arange(80) % 4
        return data_from_objects(
            ((images, labels), (images, labels)), name="few", seed=0, limits=Limits(40, 40, 16)
        )

    before = replaced("autoprune.exporting.load_data", few)
    try:
        return command_line.main(["measure", folder, "--data", "digits"])
    finally:
        replaced("autoprune.exporting.load_data", before)


def resume(study: str) -> int:
    """Open a study as the driver does that goes on with it, and read what lies beside its record."""
    from autoprune.config import make_config
    from autoprune.naming import StudyPaths
    from autoprune.search.profile import read_profile
    from autoprune.study.screens import read_screens
    from autoprune.study.store import StudyStore
    from tests.fuzz.material import SETTINGS

    def read() -> None:
        paths = StudyPaths.of(study)
        store = StudyStore.create_or_resume(make_config(SETTINGS), paths)
        try:
            store.records()
            store.notes()
            _ = store.phase, store.spent_s, store.round, store.ended_budget
            read_screens(paths)
            read_profile(paths.profile)
        finally:
            store.release()

    return told(read)


def robustness(study: str) -> int:
    """Read what was measured on corrupted images."""
    from autoprune.naming import StudyPaths
    from autoprune.study.robustness import RobustnessCache

    return told(lambda: RobustnessCache(StudyPaths.of(study)).get("", ""))
