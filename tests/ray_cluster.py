"""A Ray cluster of several nodes on this machine, whose parts can be killed.

Ray runs in a process of its own, this file as a script: it takes a command a line, and what it starts goes with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]


class RayCluster:
    """Attributes: address: for `ray` of a configuration; env: what a process needs to be let in."""

    def __init__(self, cpus: Sequence[float]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ip-ray-"))
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        (self.folder / "ray").mkdir()
        (self.folder / "token").write_text("0123456789abcdef" * 4)
        child = ROOT / "server" / "interpose_server" / "child.py"
        command = [sys.executable, str(child), str(os.getpid()), sys.executable, __file__]
        self._log = (self.folder / "log").open("w")
        self._process = subprocess.Popen(
            [*command, *map(str, cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | self.env | {"RAY_TMPDIR": str(self.folder)},
        )
        self.address = self._answer()

    def add(self, cpus: float) -> None:
        self._ask(f"add {cpus}")

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's, by what they call themselves: "ServeReplica:interpose-tiny", "ServeController"."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill_node_of(self, process: psutil.Process) -> None:
        """All that runs on a node dies at once, as if its power failed; nobody is left to tell of it."""
        raylet = psutil.Process(process.ppid())
        raylet.suspend()
        for child in raylet.children(recursive=True):
            child.kill()
        self._ask(f"kill {raylet.pid}")

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"the cluster didn't answer:\n{(self.folder / 'log').read_text()[-4000:]}")
        return line


@contextmanager
def ray_cluster(*cpus: float) -> Iterator[RayCluster]:
    """A head without cores, and a node with so many each."""
    cluster = RayCluster(cpus)
    try:
        yield cluster
    finally:
        cluster.stop()


def main(*cpus: str) -> None:
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 1 << 27}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = {"object_store_memory": 1 << 27}
    nodes = [cluster.add_node(num_cpus=float(number), **node) for number in cpus]
    print(cluster.address, file=answers)
    for line in sys.stdin:
        verb, _, value = line.strip().partition(" ")
        if verb == "add":
            nodes.append(cluster.add_node(num_cpus=float(value), **node))
        else:
            (found,) = [one for one in nodes if one.all_processes["raylet"][0].process.pid == int(value)]
            cluster.remove_node(found, allow_graceful=False)
            nodes.remove(found)
        print("done", file=answers)
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
