"""One sandbox for all fuzz tests of a process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.fuzz import material
from tests.fuzz.sandbox import Sandbox, scratch


@pytest.fixture(scope="session")
def started() -> Iterator[Sandbox]:
    root = scratch()
    try:
        material.build(root / "template")
        sandbox = Sandbox.start(root / "box", root / "template")
        yield sandbox
        sandbox.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def sandbox(started: Sandbox) -> Sandbox:
    """The sandbox, as new."""
    started.reset()
    return started
