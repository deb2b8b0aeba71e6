"""Kinds of failure that are not the recipe's, and how often what they cut off is tried again. Loads no library."""

from __future__ import annotations

WORKER_LOST = "worker-lost"
# The run was killed or ended, or a worker vanished.
CUT_OFF = ("lost", "interrupted", WORKER_LOST)
MAX_RETRIES = 2
