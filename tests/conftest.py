"""Fixtures that all tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from autoprune.space.groups import Group, Groups, Member

# One thread: the networks are tiny, and several test processes may share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep studies, cache and data of every test to itself."""
    monkeypatch.setenv("AUTOPRUNE_STUDIES", str(tmp_path / "studies"))
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AUTOPRUNE_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data, or skip."""
    default = Path(__file__).parents[2] / "shared"
    root = Path(os.environ.get("AUTOPRUNE_SHARED", default))
    if not (root / "data" / "cifar_resnet20.safetensors").is_file():
        pytest.skip("no shared data: set AUTOPRUNE_SHARED")
    return root / "data"


@pytest.fixture
def repository() -> Path:
    """The checkout that the tests lie in."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def program() -> list[str]:
    """The words that start autoprune in a process of its own."""
    return [sys.executable, "-m", "autoprune"]


@pytest.fixture
def make_groups() -> Callable[..., Groups]:
    """Build groups without a network: ``name=(type, size, prunable)``."""

    def make(**described: tuple[str, int, bool]) -> Groups:
        made = [
            Group.model_validate(
                {
                    "name": name,
                    "type": kind,
                    "size": size,
                    "members": (
                        Member(
                            layer=name, kind="conv", axis="out", index_map=tuple((i,) for i in range(size))
                        ),
                    ),
                    "prunable": prunable,
                    "reason": "" if prunable else "makes the network's output",
                }
            )
            for name, (kind, size, prunable) in described.items()
        ]
        return Groups(groups=tuple(made), input_shape=(3, 32, 32))

    return make


def measure_briefly(patch: pytest.MonkeyPatch) -> None:
    """Let whole searches measure as briefly as a trial does: their tests are about what is measured, not how well."""
    from autoprune.measure.figures import FULL_RUN
    from autoprune.measure.latency import SEARCH_PROTOCOL, measure_front

    brief = replace(FULL_RUN, starts=1, passes=1, energy_rounds=1, limit_s=1.0, block_s=0.01, most_batch=4)
    timed = partial(measure_front, protocol=SEARCH_PROTOCOL)
    patch.setattr("autoprune.search.points.measure_front", timed)
    patch.setattr("autoprune.search.points.within", lambda _: brief)
    for module in ("actions", "exporting"):
        patch.setattr(f"autoprune.{module}.FINAL_PROTOCOL", SEARCH_PROTOCOL)
        patch.setattr(f"autoprune.{module}.FULL_RUN", brief)
