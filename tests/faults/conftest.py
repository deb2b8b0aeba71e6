"""What the tests of faults share: the warm process, a study for each test, and the counts at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.crew import WARM
from tests.faults.harness import Forker, Study

Tell = Callable[..., None]


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    made = Forker(tmp_path_factory.mktemp("forker"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def crew_forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    """The warm process that drivers with workers are forked from."""
    made = Forker(tmp_path_factory.mktemp("crew-forker"), *WARM)
    yield made
    made.close()


@pytest.fixture
def study(forker: Forker, tmp_path: Path) -> Study:
    return Study(forker, tmp_path / "under-fault")


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """Keep counts of a test for the summary at the end."""

    def keep(counts: Counter[str] | None = None, **more: int | float) -> None:
        record_property("faults", json.dumps({**(counts or {}), **more}))

    return keep


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "faults":
                    lines.append(f"{report.nodeid.rpartition('/')[2]}: {value}")
    if lines:
        terminalreporter.section("counts of the fault suite")
        for line in sorted(lines):
            terminalreporter.write_line(line)
