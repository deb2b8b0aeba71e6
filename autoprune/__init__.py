"""autoprune: a compression search engine for neural networks on measured latency.

The public names are loaded on first use, so that ``import autoprune`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.api import Point, Study, open_study, search
    from autoprune.errors import AutopruneError
    from autoprune.workloads.workload import Metric

__version__ = "0.1.0"
__all__ = ["AutopruneError", "Metric", "Point", "Study", "open_study", "search"]

_HOMES = {
    "AutopruneError": "autoprune.errors",
    "Metric": "autoprune.workloads.workload",
    "Point": "autoprune.api",
    "Study": "autoprune.api",
    "open_study": "autoprune.api",
    "search": "autoprune.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
