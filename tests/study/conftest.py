"""Fixtures of the study's record: one contract for SQLite and PostgreSQL."""

from __future__ import annotations

import pytest

from tests.study.postgres import Postgres, database, postgres

__all__ = ["database", "postgres"]


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let every study of the test have its record in SQLite or in PostgreSQL; return the storage."""
    if request.param == "sqlite":
        return "sqlite"
    server: Postgres = request.getfixturevalue("postgres")
    url = server.database()
    monkeypatch.setenv("AUTOPRUNE_STORAGE", url)
    return url
