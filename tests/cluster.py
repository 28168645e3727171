"""Gateways and workers as processes of their own, started by the command line's verbs, over one broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx
from interpose_server.processes import CHILD
from serving import INTERPOSE, Served

QUICK = {"INTERPOSE_SERVER_MEASURE_S": "0", "INTERPOSE_SERVER_WORKER_THREADS": "1"}


@dataclass
class Verb:
    """`interpose ...`, and what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(90)


@dataclass
class Cluster:
    """Attributes:
    env: what every process is told.
    folder: their logs are there.
    """

    env: Mapping[str, str]
    folder: Path
    verbs: list[Verb] = field(default_factory=list)
    key: str = ""
    _numbers: Iterator[int] = field(default_factory=count)

    def start(self, *words: str | Path) -> Verb:
        log = self.folder / f"{words[0]}-{next(self._numbers)}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), str(os.getpid()), str(INTERPOSE), *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | QUICK | self.env,
            )
        verb = Verb(process, log)
        self.verbs.append(verb)
        return verb

    def gateway(self, *options: str | Path) -> tuple[Verb, str]:
        """Returns it once it answers, and its address."""
        verb = self.start("gateway", "--port", "0", *options)
        address = ""
        for _ in range(2400):
            found = [line for line in verb.said().splitlines() if line.startswith("the gateway is at ")]
            address = found[0].rpartition(" ")[2] if found else ""
            if address and answers(address):
                return verb, address
            assert verb.process.poll() is None, verb.said()
            time.sleep(0.05)
        raise TimeoutError(verb.said())

    def worker(self, model: str) -> Verb:
        """Returns it once it runs jobs."""
        verb = self.start("worker", model)
        for _ in range(2400):
            if "ready after" in verb.said():
                return verb
            assert verb.process.poll() is None, verb.said()
            time.sleep(0.05)
        raise TimeoutError(verb.said())

    def make_key(self) -> str:
        done = subprocess.run(
            [INTERPOSE, "keys", "create", "--user", "ada", "--admin"],
            env=os.environ | self.env,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def served(self, host: str) -> Served:
        return Served(host, self.key, self.folder, self.verbs[0].process)  # type: ignore[arg-type]


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz", trust_env=False, verify=False, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def run_cluster(folder: Path, env: Mapping[str, str]) -> Iterator[Cluster]:
    """Nothing runs yet; whatever is started ends with the block."""
    cluster = Cluster(env, folder)
    cluster.key = cluster.make_key()
    try:
        yield cluster
    finally:
        for verb in cluster.verbs:
            verb.process.kill()
            verb.process.wait()
