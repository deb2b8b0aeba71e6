"""Passwords in URLs of storages are shown nowhere, whatever signs they hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.errors import StorageError
from autoprune.naming import StudyPaths
from autoprune.storage_url import parse_database_url, without_passwords
from autoprune.study.database import storage_faults
from autoprune.study.place import Place

_WORDS = st.text(alphabet="abcXYZ019._~!$*+,;=:@/?#[]%-", min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:geheim@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("postgresql+psycopg://u:a@b/c:d@h/db", "postgresql+psycopg://u:***@h/db"),
        ("postgresql://u@h/db", "postgresql://u@h/db"),
        ("postgresql:///db?user=u&password=geheim&x=1", "postgresql:///db?user=u&password=***&x=1"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
        ("cannot connect to 'redis://:geheim@h' twice", "cannot connect to 'redis://:***@h' twice"),
        ("host=h user=u password=geheim dbname=d", "host=h user=u password=*** dbname=d"),
        ("s3://bucket/x?sig_token=geheim", "s3://bucket/x?sig_token=***"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_passwords_are_hidden_and_the_rest_is_not(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


@given(
    before=_WORDS,
    after=_WORDS,
    user=st.sampled_from(["", "u", "user.name"]),
    text=st.sampled_from(["", "error: ", "x='"]),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_no_password_is_left(before: str, after: str, user: str, text: str) -> None:
    """Whatever signs stand around it, percent-encoded or not, the secret is gone."""
    secret = f"{before}GEHEIM{after}"
    assert "GEHEIM" not in without_passwords(f"{text}postgresql://{user}:{secret}@host:5432/db")
    assert "GEHEIM" not in without_passwords(
        f"{text}postgresql://host/db?password=GEHEIM{after.partition('&')[0]}"
    )


def test_a_long_message_is_cleaned_before_it_is_cut() -> None:
    place = Place(StudyPaths.of("s"), parse_database_url("postgresql://me:tellnobodythis@host/db"))
    with pytest.raises(StorageError) as caught, storage_faults(place):
        raise OSError("x" * 292 + " tellnobodythis is wrong")
    assert "tell" not in caught.value.message
