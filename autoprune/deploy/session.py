"""How onnxruntime sessions are opened, the same for scoring, timing and reading the graph back. Torch-free."""

from __future__ import annotations

import onnxruntime as ort

# Left on, this optimiser turns a float layer between two int8 layers into int8, against what the recipe says.
SESSION_ENTRIES = {"optimization.disable_specified_optimizers": "WeightBiasQuantization"}


def session_options(threads: int) -> ort.SessionOptions:
    """Return the options of a session.

    Args:
        threads: Threads of one inference.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait by spinning take the cores from the model that is timed next: with two threads a ratio of
    # 0.28 was measured as 0.07.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    return options
