"""Every option of every verb with hostile values: a message and the right exit code, nothing else touched."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.arguments import RIGHT, command, may_write, verbs
from tests.fuzz.sandbox import Sandbox
from tests.fuzz.zygote import ACCEPTED

CASES = 70
LONG = 3400


def test_every_verb_is_fuzzed() -> None:
    assert set(RIGHT) == set(verbs())


@pytest.mark.parametrize("verb", sorted(RIGHT))
def test_right_words_are_accepted(sandbox: Sandbox, verb: str) -> None:
    words = [*verb.split(), *RIGHT[verb]]
    if verb == "front":
        words.append("--json")
    outcome = sandbox.check(words, may_write=may_write(words, sandbox.work))
    assert outcome.code in (0, ACCEPTED), outcome


def run(sandbox: Sandbox, seeds: range) -> None:
    known = verbs()
    for seed in seeds:
        words = command(random.Random(seed), known)
        try:
            sandbox.check(words, may_write=may_write(words, sandbox.work))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from None


def test_hostile_words(sandbox: Sandbox) -> None:
    run(sandbox, range(CASES))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_hostile_words(sandbox: Sandbox) -> None:
    run(sandbox, range(CASES, CASES + LONG))
