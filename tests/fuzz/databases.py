"""A study's database with hostile values in its tables, or with faults in its bytes."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sqlite3
from typing import Any

from tests.fuzz import hostile
from tests.fuzz.sandbox import Sandbox

READERS: tuple[dict[str, Any], ...] = (
    {"words": ["front", "s"]},
    {"words": ["front", "s", "--json"]},
    {"words": ["front", "s", "--csv", "--max-drop", "0.5"]},
    {"words": ["front", "s", "--knee"]},
    {"words": ["report", "s", "--json"]},
    {"words": ["export", "s", "--trial", "1", "--to", "new"]},
    {"words": ["studies"]},
    {"call": "tests.fuzz.calls.resume", "arguments": ["s"]},
)
MAY_WRITE = ("studies/s", "new", ".unfinished-")
# Values that JSON in a cell never is.
CELLS: tuple[Any, ...] = (
    None, "", "x", "{", "[" * 5000, "NaN", "Infinity", "1e999", "9" * 5000, '"\\ud800"', 0, -1, 2**62, 1.5, float("inf"),
    b"\x80\x04\x95", "\0", "null", "[]", "{}", '"x"', "5", "true", '["a"]', "é" * 3000, "RUNNING", "COMPLETE", "PRUNED", "FAIL",
    "WAITING", "INF_POS", "INF_NEG", "FINITE", "MINIMIZE", "NOT_SET", "2026-01-01", "x'; DROP TABLE trials;--",
)  # fmt: skip


def run(sandbox: Sandbox, seed: int) -> None:
    """Read one study whose database is hostile."""
    random_ = random.Random(f"database {seed}")
    folder = sandbox.work / "studies" / "s"
    database = folder / "study.db"
    kept = sandbox.template / "studies" / "s" / "study.db"
    if random_.random() < 0.2:
        database.write_bytes(hostile.mutated(random_, kept.read_bytes()))
        done = ["bytes"]
    else:
        with sqlite3.connect(database) as connection:
            done = [change(random_, connection) for _ in range(random_.choice((1, 1, 2, 3)))]
        connection.close()
    case = random_.choice(READERS)
    try:
        sandbox.check(case=case, may_write=MAY_WRITE)
    except AssertionError as error:
        raise AssertionError(f"database, seed {seed}: {done}: {error}") from None
    finally:
        for name in ("study.db-wal", "study.db-shm"):
            (folder / name).unlink(missing_ok=True)
        shutil.copyfile(kept, database)


def change(random_: random.Random, connection: sqlite3.Connection) -> str:
    """Change one thing in the tables; return what."""
    try:
        return _change(random_, connection)
    except (sqlite3.Error, ValueError, TypeError, IndexError) as error:  # an earlier change is in the way
        return f"nothing: {error}"


def _change(random_: random.Random, connection: sqlite3.Connection) -> str:
    kind = random_.random()
    if kind < 0.55:
        return _attribute(random_, connection)
    if kind < 0.62:
        return _pickled(random_, connection)
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    table = random_.choice(tables)
    if kind < 0.66:
        connection.execute(f"DROP TABLE {table}")
        return f"DROP {table}"
    if kind < 0.7:
        connection.execute(f"DELETE FROM {table}")
        return f"DELETE {table}"
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    column, value = random_.choice(columns), random_.choice(CELLS)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    row = random_.choice([row[0] for row in connection.execute(f"SELECT rowid FROM {table}")] or [0])
    connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, row))
    return f"{table}.{column} = {value!r:.60}"


def _attribute(random_: random.Random, connection: sqlite3.Connection) -> str:
    """Change an attribute of the study or of a trial, inside of its JSON."""
    table = random_.choice(("trial_user_attributes", "trial_user_attributes", "study_user_attributes"))
    rows = list(connection.execute(f"SELECT rowid, key, value_json FROM {table}"))
    if not rows:
        return "nothing"
    row, key, text = random_.choice(rows)
    content = json.loads(text)
    try:
        inner = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        inner = content
    if isinstance(inner, dict | list) and random_.random() < 0.9:
        made: Any = json.dumps(hostile.changed(random_, inner))
        made = hostile.mutated(random_, made.encode()).decode("latin-1") if random_.random() < 0.1 else made
    else:
        made = hostile.value(random_)
    new = json.dumps(made) if random_.random() < 0.95 else random_.choice(CELLS)
    connection.execute(f"UPDATE {table} SET value_json = ? WHERE rowid = ?", (new, row))
    return f"{table} {key} = {new!r:.300}"


class Canary:
    """A pickle that says so when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("canary",))


def _pickled(random_: random.Random, connection: sqlite3.Connection) -> str:
    """Put a pickle where a value lies."""
    table = random_.choice(("trial_user_attributes", "study_user_attributes", "trial_system_attributes"))
    connection.execute(f"UPDATE {table} SET value_json = ?", (pickle.dumps(Canary()),))
    return f"{table} pickled"
