"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, raw: bytes) -> None:
    """Write a file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(raw)
    temporary.replace(path)
