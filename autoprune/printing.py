"""Texts of unknown origin on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return a text with what a terminal would obey, or cannot print, written out; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
