"""Where a record is: remembered without the password, followed by readers, and refused where it would be doubled."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path

import pytest

from autoprune.api import open_study
from autoprune.cli.main import main
from autoprune.errors import StorageError, UsageError
from autoprune.naming import StudyPaths
from autoprune.study.listing import list_studies
from autoprune.study.store import StudyStore
from tests.study.made import add, open_for_writing
from tests.study.postgres import GUARDED, USER, Postgres

SECRET = "s3cr3t-word"


def test_readers_follow_the_folder(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_for_writing("kept", storage=database)
    add(store, 0.5)
    store.release()
    assert not StudyPaths.of("kept").database.exists()
    assert len(StudyStore.open("kept").records()) == 1
    assert main(["front", "kept", "--json"]) == 0
    assert main(["report", "kept"]) == 0
    assert main(["studies", "--json"]) == 0
    shown = capsys.readouterr().out
    assert '"trial": 0' in shown and "report.html" in shown and '"trials": 1' in shown


def test_a_study_without_a_folder_is_read_from_its_database(
    database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_for_writing("far", storage=database, seed=3)
    add(store, 0.5)
    store.release()
    shutil.rmtree(store.paths.root)
    with pytest.raises(UsageError, match="unknown study 'far'"):
        StudyStore.open("far")
    assert StudyStore.open("far", database).settings()["seed"] == 3
    assert open_study("far", database).points()
    assert main(["front", "far", "--storage", database]) == 0
    assert [row["study"] for row in list_studies(database)] == ["far"]
    with pytest.raises(UsageError, match="did you mean 'far'"):
        StudyStore.open("fare", database)
    assert not store.paths.root.exists()


def test_a_driver_without_the_folder_goes_on_by_the_database_s_settings(database: str) -> None:
    open_for_writing("moved", storage=database, seed=3).release()
    shutil.rmtree(StudyPaths.of("moved").root)
    with pytest.raises(UsageError, match=r"seed: 3 -> 4"):
        open_for_writing("moved", storage=database, seed=4)
    open_for_writing("moved", storage=database, seed=3).release()
    assert StudyPaths.of("moved").settings.is_file()


def test_one_study_has_one_record(database: str) -> None:
    open_for_writing("here").release()
    with pytest.raises(UsageError, match=r"has its record in .*study\.db, not in postgresql:"):
        open_for_writing("here", storage=database)
    open_for_writing("there", storage=database).release()
    with pytest.raises(UsageError, match=r"has its record in postgresql:.*, not in .*elsewhere"):
        open_for_writing("there", storage="postgresql://h/elsewhere")


def test_the_environment_leaves_studies_in_files_alone(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_for_writing("old")
    add(store, 0.5)
    store.release()
    monkeypatch.setenv("AUTOPRUNE_STORAGE", database)
    assert len(StudyStore.open("old").records()) == 1
    open_for_writing("old").release()
    open_for_writing("new").release()
    assert StudyPaths.of("old").database.is_file() and not StudyPaths.of("new").database.exists()
    assert {row["study"] for row in list_studies()} == {"old", "new"}


def test_fresh_renames_in_the_database_too(database: str) -> None:
    for seed in range(3):
        store = open_for_writing("again", fresh=True, storage=database, seed=seed)
        add(store, 0.5)
        store.release()
    found = {row["study"]: row["trials"] for row in list_studies(database)}
    assert found == {"again": 1, "again.1": 1, "again.2": 1}
    assert StudyStore.open("again.1").settings()["seed"] == 0


def test_a_study_of_another_program_is_left_alone(database: str) -> None:
    import optuna

    url = database.replace("postgresql:", "postgresql+psycopg:")
    other = optuna.create_study(study_name="taken", storage=url)
    other.add_trial(optuna.trial.create_trial(value=1.0))
    for fresh in (False, True):
        with pytest.raises(StorageError, match="was not made by autoprune"):
            open_for_writing("taken", fresh=fresh, storage=database)
    assert [row["study"] for row in list_studies(database)] == []


def test_readers_of_an_empty_database_make_nothing_in_it(postgres: Postgres, database: str) -> None:
    with pytest.raises(StorageError, match="holds no studies of autoprune"):
        StudyStore.open("none", database)
    assert list_studies(database) == []
    assert postgres.sql("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", database).strip() == "0"


def test_a_database_of_the_c_locale_is_read_as_text(postgres: Postgres) -> None:
    postgres.sql("CREATE DATABASE plain TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'")
    store = open_for_writing("plain", storage=postgres.url("plain"))
    store.note("word", "größer")
    store.release()
    assert StudyStore.open("plain").notes() == {"word": "größer"}


def test_a_damaged_pointer_is_named() -> None:
    open_for_writing("lost").release()
    StudyPaths.of("lost").storage.write_text('{"storage": "redis://h"}')
    with pytest.raises(StorageError, match=r"storage\.json"):
        StudyStore.open("lost")


def test_without_psycopg_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.study.place.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'autoprune\[postgres\]'"):
        open_for_writing("none", storage="postgresql://h/db")


def test_a_server_that_is_not_there_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"postgresql://me:{SECRET}@127.0.0.1:1/db"
    with pytest.raises(StorageError, match="see that the server runs") as caught:
        open_for_writing("down", storage=url)
    told = "".join(traceback.format_exception(caught.value))
    for words in (["front", "down"], ["studies"], ["--debug", "report", "down", "--json"]):
        assert main([*words, "--storage", url]) == 4
    told += "".join(capsys.readouterr())
    assert "127.0.0.1:1/db" in told
    assert SECRET not in told


def test_passwords_are_asked_for_and_kept_nowhere(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.database()
    postgres.sql(f"DROP ROLE IF EXISTS {GUARDED}")
    postgres.sql(f"CREATE ROLE {GUARDED} SUPERUSER LOGIN PASSWORD '{SECRET}'")
    bare = url.replace(USER, GUARDED, 1)
    for wrong in (bare, bare.replace("@", ":n0t-the-one@", 1)):
        with pytest.raises(StorageError, match=r"PGPASSWORD, in ~/\.pgpass") as caught:
            open_for_writing("secret", storage=wrong)
        assert "n0t-the-one" not in "".join(traceback.format_exception(caught.value))
    store = open_for_writing("secret", storage=bare.replace("@", f":{SECRET}@", 1))
    add(store, 0.5)
    with pytest.raises(StorageError) as caught:
        open_for_writing("secret", storage=bare.replace("@", f":{SECRET}@", 1))
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in repr(vars(store)) + repr(store._storage.engine) + store._storage.url
    store.release()
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert kept == []
    monkeypatch.setenv("AUTOPRUNE_STORAGE", bare.replace("@", f":{SECRET}@", 1))
    assert len(StudyStore.open("secret").records()) == 1
    monkeypatch.delenv("AUTOPRUNE_STORAGE")
    monkeypatch.setenv("PGPASSWORD", SECRET)
    assert len(StudyStore.open("secret").records()) == 1
