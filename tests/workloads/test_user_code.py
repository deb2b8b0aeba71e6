"""Functions from a user's own file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autoprune.errors import UsageError
from autoprune.workloads.user_code import load_function


def test_a_file_may_import_its_neighbours_and_define_functions_under_conditions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_neighbour.py").write_text("VALUE = 7\n")
    (tmp_path / "own.py").write_text(
        "try:\n"
        "    from own_neighbour import VALUE\n"
        "    def build():\n"
        "        return VALUE\n"
        "except ImportError:\n"
        "    fallback = None\n"
    )
    assert load_function(str(tmp_path / "own.py"), "build", "--model", trusted=True)() == 7
    with pytest.raises(UsageError, match="unknown function in .*own.py 'buidl'; did you mean 'build'"):
        load_function(str(tmp_path / "own.py"), "buidl", "--model", trusted=True)
    with pytest.raises(UsageError, match="--trust-code"):
        load_function(str(tmp_path / "own.py"), "build", "--model", trusted=False)
