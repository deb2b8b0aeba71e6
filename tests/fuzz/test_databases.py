"""Hostile values in a study's database: a message and the right exit code, nothing run, nothing touched elsewhere."""

from __future__ import annotations

import pytest

from tests.fuzz.databases import MAY_WRITE, READERS, run
from tests.fuzz.sandbox import Sandbox

CASES = 30
LONG = 2000


@pytest.mark.parametrize("case", READERS, ids=str)
def test_the_right_database_is_read(sandbox: Sandbox, case: dict[str, object]) -> None:
    assert sandbox.check(case=case, may_write=MAY_WRITE).code == 0


def test_hostile_databases(sandbox: Sandbox) -> None:
    for seed in range(CASES):
        run(sandbox, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_hostile_databases(sandbox: Sandbox) -> None:
    for seed in range(CASES, CASES + LONG):
        run(sandbox, seed)
