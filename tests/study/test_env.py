"""env.json: one entry for each run, and a damaged file stops nothing."""

from __future__ import annotations

import pytest

from autoprune.config import StudyConfig
from autoprune.naming import StudyPaths
from autoprune.study.env import read_environment, write_environment


def test_every_run_adds_an_entry_and_the_first_stays_first() -> None:
    paths = StudyPaths.of("told")
    assert read_environment(paths) == []
    config = StudyConfig(model="m", data="d", study="told", seed=3)
    write_environment(paths, config, {"cpu": "one"}, "abc")
    write_environment(paths, config, {"cpu": "two"}, "abd")
    first, second = read_environment(paths)
    assert (first["host"], first["data_fingerprint"], first["seed"]) == ({"cpu": "one"}, "abc", 3)
    assert first["settings"] == config.model_dump(mode="json")
    assert (second["host"], second["data_fingerprint"]) == ({"cpu": "two"}, "abd")


@pytest.mark.parametrize("content", [b"", b"[{", b"\xff", b'{"host": 1}'])
def test_a_damaged_file_is_begun_anew(content: bytes) -> None:
    paths = StudyPaths.of("damaged")
    paths.root.mkdir(parents=True)
    paths.environment.write_bytes(content)
    assert read_environment(paths) == []
    config = StudyConfig(model="m", data="d", study="damaged")
    write_environment(paths, config, {}, "")
    assert len(read_environment(paths)) == 1
    aside = paths.root / f"{paths.environment.name}.damaged-1"
    assert aside.read_bytes() == content
    # A sound file stays where it is.
    write_environment(paths, config, {}, "")
    assert sorted(path.name for path in paths.root.iterdir()) == sorted([paths.environment.name, aside.name])


def test_no_changed_letter_changes_what_is_told() -> None:
    paths = StudyPaths.of("flipped")
    config = StudyConfig(model="m", data="d", study="flipped", seed=3)
    write_environment(paths, config, {"cpu": "one", "cores": 2, "ghz": 2.5}, "abc")
    raw, (told,) = paths.environment.read_bytes(), read_environment(paths)
    noticed = 0
    for place in range(len(raw)):
        paths.environment.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        found = read_environment(paths)
        noticed += not found
        assert not found or {name: found[0][name] for name in told} == told
    assert noticed > 0.95 * len(raw)
