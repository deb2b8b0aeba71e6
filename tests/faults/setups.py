"""What a fork changes of itself before it runs a study: limits."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path


def file_limit(size: int) -> None:
    """Let no file grow beyond so many bytes: a write beyond fails as on a full disk, with another number."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def memory_limit(beyond: int) -> None:
    """Let the process allocate so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + beyond
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def memory_group(limit: int) -> None:
    """Let the kernel kill the process when it uses more bytes; end with a word about it where that cannot be had."""
    name = f"autoprune-tests-{os.getpid()}"
    try:
        old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        if old.is_dir():
            group = old / name
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(limit))
        else:
            group = new / name
            group.mkdir()
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        print(f"no memory group: {error}", file=sys.stderr, flush=True)
        os._exit(5)
