"""What the workers of this study do in place of a bench: sleep for as long as a trial takes. Loads no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def serve(seconds: float) -> Callable[[Any, Callable[[], bool]], Any]:
    """Return what answers requests: a trial sleeps and leaves a file, everything else is done at once."""
    from autoprune.search.executors.contract import Reference, Reply

    def answer(request: Any, stopped: Callable[[], bool]) -> Any:
        if isinstance(request, Reference):
            return None
        if request.kind == "trial":
            time.sleep(seconds)
            (request.folder / "model.onnx").write_bytes(b"model")
        return Reply(request.token, score=0.0)

    return answer
