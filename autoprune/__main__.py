"""``python -m autoprune``."""

from __future__ import annotations

from autoprune.cli.main import run

if __name__ == "__main__":
    run()
