"""Values that break programs, drawn by a seed."""

from __future__ import annotations

import json
import random
from typing import Any

TEXTS = (
    "..", "../x", "../outside/x", "a/b", "./a/../../x", "/etc/passwd", "/etc/shadow", "/root", "/", ".", "~", "~root/x",
    "a\0b", "é" * 300, "x" * 5000, "CON", "NUL", "aux.txt", "x'; DROP TABLE trials;--", '"; DROP TABLE studies;--',
    "<script>alert(1)</script>", "</script>", "javascript:alert(1)", "-rf", "--", "-", "", " ", "\t", "\n", "\r\nautoprune: x",
    "=cmd()|' /C calc'!A0", "+1", "@SUM(1)", "-1+1", "nan", "inf", "-inf", "1e309", "9" * 400, "0x10", "１２", "1_000", "-0",
    "\u202e", "\udcff", "\ud800", "\ufeff", "\u2028", "%s%n%d", "%(x)s", "{}", "{0.__class__}", "${HOME}",
    "$(touch canary)", "`touch canary`", ";touch canary", "|touch canary", "link", "link/x", "link/kept", "fifo", "empty",
    "images", "m.py", "m.py:build", "m.py:", ":build", "m.py:build:x", "/dev/zero", "/dev/null", "/dev/full", "/dev/stdin",
    "/proc/self/mem", "/proc/self/environ", "/proc/self/fd/0", "studies/s/study.db", "studies", "artifact/model.onnx",
    "settings.yaml", "space.yaml", "recipe.yaml", "measured.json", "weights.safetensors", "\x1b[31m\x1b]0;x\x07", "[bold]", "[/bold]",
    "[link=x]", "![](http://x)", "| a | b |", "null", "true", "False", "yes", "[]", "{}", "[1, 2", "!!python/object/apply:os.system [id]",
    "&a [*a]", "a: b: c", "#", "imagefolder:", "imagefolder:/", "imagefolder:..", "imagefolder:images", "imagefolder:fifo",
    "imagefolder:/proc", "hf:x", "timm/x", "file:///etc/passwd", "http://127.0.0.1:1/x", "sqlite:////etc/x.db",
    "postgresql://u:geheim@h/db", "ray://127.0.0.1:1",
)  # fmt: skip
NUMBERS = (
    "0", "1", "-1", "2", "7", "8", "0.5", "1.0", "1.5", "-0.0", "1e-320", "1e308", "1e309", "-1e309", "nan", "inf", "-inf",
    "2147483647", "2147483648", "-2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551616",
    "9" * 400, "00", "1e3", "1_0", " 1", "１", "0x1f", "1.", ".5", "", "x", "1;2", "1,2",
)  # fmt: skip


def text(random_: random.Random) -> str:
    """Return a hostile text."""
    if random_.random() < 0.85:
        return random_.choice(TEXTS)
    length = random_.choice((1, 3, 12, 80))
    return "".join(
        chr(random_.choice((random_.randrange(1, 128), random_.randrange(1, 0xD7FF)))) for _ in range(length)
    )


def number(random_: random.Random) -> str:
    """Return a number as text, most of them out of range, some none at all."""
    kinds = random_.random()
    if kinds < 0.6:
        return random_.choice(NUMBERS)
    if kinds < 0.8:
        return str(random_.randint(-(2**40), 2**40))
    return repr(random_.uniform(-10, 10))


def value(random_: random.Random, depth: int = 0) -> Any:
    """Return a value of plain data."""
    kind = random_.randrange(12 if depth < 3 else 9)
    simple: list[Any] = [
        None, True, False, 0, -1, 1, 10**30, -(2**63), 1e308, 1e-308, float("nan"), float("inf"), -0.0, 0.5, 2**31, 10**400,
        "", "x", [], {},
    ]  # fmt: skip
    if kind < 6:
        return random_.choice(simple)
    if kind < 9:
        return text(random_)
    if kind == 9:
        return [value(random_, depth + 1) for _ in range(random_.randrange(4))]
    return {text(random_): value(random_, depth + 1) for _ in range(random_.randrange(4))}


def changed(random_: random.Random, content: Any) -> Any:
    """Return plain data with one place of it replaced, doubled, renamed or taken out."""
    if isinstance(content, dict) and content and random_.random() < 0.93:
        own = dict(content)
        key = random_.choice(sorted(own, key=str))
        kind = random_.randrange(8)
        if kind == 0:
            del own[key]
        elif kind == 1:
            own[text(random_)] = own.pop(key)
        elif kind == 2:
            own[text(random_)] = value(random_)
        else:
            own[key] = changed(random_, own[key])
        return own
    if isinstance(content, list) and content and random_.random() < 0.93:
        parts = list(content)
        index = random_.randrange(len(parts))
        kind = random_.randrange(6)
        if kind == 0:
            del parts[index]
        elif kind == 1:
            parts.insert(index, value(random_))
        elif kind == 2:
            parts = parts * 50
        else:
            parts[index] = changed(random_, parts[index])
        return parts
    return value(random_)


def mutated(random_: random.Random, raw: bytes) -> bytes:
    """Return bytes with one to four faults: flipped, cut, doubled, spliced, or with what readers trip over put in."""
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        raw = _faulty(random_, bytearray(raw))
    return raw


_PIECES = (
    b"\0", b"\xef\xbb\xbf", b"\xff\xfe", "é".encode("latin-1"), b"\r", b"\x85", b"9" * 400, b"1e999", b"NaN", b"-Infinity", b"!!python/name:os.system ",
    b"!!binary x", b"&a ", b"*a", b"<<: ", b"? ", b"--- ", b"...\n", b"%YAML 1.1\n---\n", b"- " * 40, b"[" * 200, b"{" * 200, b'{"a":' * 2000,
    b"[" * 100_000, b"\n" * 50_000, b" " * 200_000, b"a: " * 20, b"0o17", b"0x10", b"1:30", b"2001-01-01", b"~", b"'", b'"', b"\\", b"|+9\n", b">\n", b"\t", b"../../",
    b"/etc/passwd", b"\xed\xa0\x80", b"\xf0\x9f\x92\xa9", b"\x1b[2J",
)  # fmt: skip


def _faulty(random_: random.Random, raw: bytearray) -> bytes:
    kind = random_.randrange(9)
    at = random_.randrange(len(raw) + 1)
    if kind == 0 and raw:
        raw[at % len(raw)] ^= 1 << random_.randrange(8)
    elif kind == 1:
        del raw[at:]
    elif kind == 2:
        del raw[at : at + random_.choice((1, 4, 64))]
    elif kind == 3:
        raw[at:at] = random_.choice(_PIECES)
    elif kind == 4:
        raw[at : at + 8] = random_.choice((b"\xff" * 8, b"\0" * 8, (2**63 - 1).to_bytes(8, "little")))
    elif kind == 5:
        other = random_.randrange(len(raw) + 1)
        raw[at:at] = raw[min(at, other) : max(at, other)][:4096]
    elif kind == 6:
        lines = bytes(raw).split(b"\n")
        lines.insert(random_.randrange(len(lines) + 1), random_.choice(lines))
        return b"\n".join(lines)
    elif kind == 7:
        raw[at:at] = random_.randbytes(random_.choice((1, 16, 300)))
    else:
        raw += random_.randbytes(64)
    return bytes(raw)


def as_json(content: Any) -> bytes:
    """Return plain data as JSON, NaN and lone surrogates included."""
    return json.dumps(content).encode("utf-8", "surrogatepass")
