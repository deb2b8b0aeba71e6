"""A small Ray cluster on this machine, whose parts are killed and stopped; in a process of its own.

``python -m tests.faults.raylets`` starts a head and reads one JSON command a line; :class:`Raylets` sends them.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).parents[2]
_STORE = 80 * 1024 * 1024


class Raylets:
    """A cluster with a head that runs no trials.

    Args:
        address: IP address of its head.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            "PYTHONPATH": str(_REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        if address == "127.0.0.1":  # as connect() does where it starts Ray
            self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.raylets", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=_REPOSITORY,
            env={**os.environ, **self.environment},
        )
        self.address: str = self._read()["address"]

    def add(self, cpus: float = 1, environment: dict[str, str] | None = None, **resources: float) -> int:
        """Add a node and return the process id of its raylet."""
        own = {key.replace("__", ":"): value for key, value in resources.items()}
        answer = self._ask(num_cpus=cpus, env_vars={**self.environment, **(environment or {})}, resources=own)
        return int(answer["raylet"])

    def kill_head(self) -> None:
        """Kill the head: its control store and its raylet."""
        self._ask(head="kill")

    def close(self) -> None:
        """End the cluster."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, "the cluster did not start"
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer


def children(pid: int) -> list[int]:
    """Return the processes that a process started, and theirs."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(place.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found[1:]


def main() -> None:
    """Run the cluster until the standard input ends."""
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": _STORE,
        "node_ip_address": sys.argv[1],
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    threading.Thread(target=_take_note, args=(cluster,), daemon=True).start()
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "head" in command:
            os.kill(cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
            os.kill(_raylet(cluster.head_node), signal.SIGKILL)
            print(json.dumps({}), flush=True)
            continue
        node = cluster.add_node(
            include_dashboard=False, object_store_memory=_STORE, node_ip_address=sys.argv[1], **command
        )
        print(json.dumps({"raylet": _raylet(node)}), flush=True)
    cluster.shutdown()


def _take_note(cluster: Any) -> None:
    """Let killed processes go: to its workers a raylet is there until somebody takes note of its end."""
    while True:
        for node in cluster.list_all_nodes():
            for process in (each.process for found in node.all_processes.values() for each in found):
                process.poll()
        time.sleep(0.2)


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


if __name__ == "__main__":
    main()
