"""Addresses of databases: what is read of them, and that no password is shown."""

from __future__ import annotations

import pytest

from autoprune.config import make_config
from autoprune.errors import UsageError
from autoprune.storage_url import (
    DatabaseUrl,
    check_storage,
    parse_database_url,
    shown_storage,
    without_passwords,
)

SECRET = "s3cr3t/wo:rd"
URL = "postgresql://me:s3cr3t%2Fwo%3Ard@host:5433/my%20db?sslmode=require&sslpassword=s3cr3t/wo:rd"


@pytest.mark.parametrize(
    ("given", "text", "secrets"),
    [
        ("postgresql://me@host/db", "postgresql://me@host/db", {}),
        ("postgres://host/db", "postgresql://host/db", {}),
        ("postgresql+psycopg://host:5433/db", "postgresql://host:5433/db", {}),
        ("postgresql://me@/db?host=/tmp/x", "postgresql://me@/db?host=/tmp/x", {}),
        ("postgresql://me:p%40ss@[::1]:5/db", "postgresql://me@[::1]:5/db", {"password": "p@ss"}),
        ("postgresql://h/db?password=p&user=a", "postgresql://h/db?user=a", {"password": "p"}),
        (
            URL,
            "postgresql://me@host:5433/my%20db?sslmode=require",
            {"password": SECRET, "sslpassword": SECRET},
        ),
    ],
)
def test_urls_are_read_and_passwords_taken_out(given: str, text: str, secrets: dict[str, str]) -> None:
    found = parse_database_url(given)
    assert (found.text, found.secrets) == (text, secrets)
    assert parse_database_url(found.text).text == text


def test_a_url_is_shown_without_its_password() -> None:
    found = parse_database_url(URL)
    config = make_config({"model": "m", "storage": URL})
    shown = [
        repr(found),
        str(found),
        repr(config),
        str(config),
        config.model_dump_json(),
        str(config.identity()),
    ]
    shown += [found.clean(f"in {URL}: {SECRET}"), without_passwords(f"x {URL} y"), str(shown_storage(URL))]
    shown += [without_passwords("host=h password='s3cr3t w' user=u")]
    assert [text for text in shown if "s3cr3t" in text] == []
    assert config.storage == URL, "who connects needs it"
    assert "storage" not in config.identity()
    assert "user=u" in shown[-1]


def test_short_secrets_do_not_garble_messages() -> None:
    assert DatabaseUrl("postgresql://h/db", {"password": "a"}).clean("a database") == "a database"


@pytest.mark.parametrize("given", ["sqlite", "sqlite:////tmp/study.db", None])
def test_the_study_s_own_file_is_allowed(given: str | None) -> None:
    assert check_storage(given, "/tmp/study.db") == given


def test_another_file_is_not() -> None:
    with pytest.raises(UsageError, match="names another file than the study's own"):
        check_storage("sqlite:////tmp/other.db", "/tmp/study.db")
