"""The search: what is tried next, for how long, and how one trial runs.

The library's function is called ``autoprune.search`` as well. Importing anything from this folder makes Python bind
that name to the folder, so the folder can be called too and passes the call on.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallableFolder(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("autoprune.api").search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableFolder
