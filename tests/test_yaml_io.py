"""The YAML reader: plain data only, every fault with its line, and never slow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.errors import UsageError
from autoprune.yaml_io import MAX_BYTES, parse_yaml, read_yaml

GENEROUS_S = 10.0


def test_plain_values_as_yaml_1_2_means_them() -> None:
    text = (
        "rate: 1e-3\ndevice: no\nday: 2026-01-01\nten: 010\nat: 8:30\nnone: null\nlist: [1, 2.5, true, x]\n"
    )
    assert parse_yaml(text, "f").values == {
        "rate": 0.001, "device": "no", "day": "2026-01-01", "ten": 10, "at": "8:30", "none": None,
        "list": [1, 2.5, True, "x"],
    }  # fmt: skip


def test_lines_are_known_for_every_value() -> None:
    document = parse_yaml("a:\n  b:\n   - 1\n   - c: 2\n", "f")
    assert [document.line(at) for at in (("a",), ("a", "b"), ("a", "b", 0), ("a", "b", 1, "c"))] == [
        1,
        2,
        3,
        4,
    ]
    assert document.line(("a", "b", 1, "c", "deeper")) == 4
    assert document.line(("elsewhere",)) == 1


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3", 3, "'a' is there twice"),
        ("a: {x: 1,\n x: 2}", 2, "'x' is there twice"),
        ("a: &n 1\nb: *n", 1, "anchors"),
        ("a: 1\nb: *n", 2, "aliases"),
        ("a: 1\n<<: {b: 2}", 2, "'<<' is not allowed"),
        ("a: 1\nb: !!python/object/apply:os.system [id]", 2, "tags"),
        ("a: !mine {b: 1}", 1, "tags"),
        ("1: a", 1, "key 1 is not text"),
        ("? [a]\n: 1", 1, "is not text"),
        ("a: 1\n---\nb: 2", 2, "one document"),
        ("%YAML 1.1\n---\na: no", 2, "YAML 1.2 is read, not 1.1"),
        ("a:\n\tb: 1", 2, "not valid YAML"),
        ("a: [1, 2", 1, "not valid YAML"),
        ("a: 1\nb: \x07", 2, "not valid YAML"),
        ("a: 1\nb: x\0y", 2, "NUL"),
        ("a: " + "9" * 5000, 1, "cannot be read"),
        ("a: " + "[" * 40 + "]" * 40, 1, "deeper than 32"),
        ("a: " + "x" * 20_000, 1, "the line has"),
    ],
)
def test_what_is_not_plain_data_is_refused_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "f.yaml")
    assert f"f.yaml:{line}: " in caught.value.message
    assert says in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "- a\n" * 250_000, "[" * 900_000, "!" * 900_000, "a" * 900_000, "&a " * 300_000, "a\n" * 400_000,
        "\n" * 900_000, "- " * 400_000, "{a: " * 200_000, "a: |\n" + " b\n" * 300_000, "#\n" * 400_000,
        "\n".join(" " * i + "-" for i in range(1300)), "a: b\n c\n" * 100_000, "x" * (MAX_BYTES + 1),
    ],
    ids=range(14),
)  # fmt: skip
def test_nothing_is_slow(text: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UsageError):
        parse_yaml(text, "f")
    assert time.monotonic() - begun < GENEROUS_S


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab1:-[]{}&*!|>'\"#,?% \n\t\0é\ufeff", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        message = "f:" if parse_yaml(text, "f") else ""
    except UsageError as error:
        message = error.message
    assert message.startswith("f:")


def test_a_large_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as stream:
        stream.truncate(50_000_000)
    with pytest.raises(
        UsageError, match=r"large\.yaml:1: the file has 50,000,000 bytes; allowed: up to 1,000,000"
    ):
        read_yaml(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(UsageError, match=r"latin\.yaml:2: the file is not UTF-8"):
        read_yaml(latin)
    for path, says in (
        (tmp_path, "not a regular file"),
        (tmp_path / "gone", "no such file"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(UsageError, match=says):
            read_yaml(path)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path).values == {"a": 1}
