"""Many clients of a server, in a few processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from lab import SMOL
from serving import Served

PROCESSES = 4


@contextmanager
def crowd(server: Served, clients: int, processes: int = PROCESSES) -> Iterator[Crowd]:
    """So many clients, each a user of its own, all of whom have run a job."""
    keys = [new_key(server, f"user-{index}") for index in range(clients)]
    parts = [keys[place::processes] for place in range(min(processes, clients))]
    firsts = [sum(len(part) for part in parts[:place]) for place in range(len(parts))]
    script = Path(__file__).with_name("client.py")
    started = [
        subprocess.Popen(
            [sys.executable, script, server.host, SMOL, str(first), *part],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for first, part in zip(firsts, parts, strict=True)
    ]  # fmt: skip
    try:
        made = Crowd(started, [len(part) for part in parts])
        made.forwards_per_s(clients, 0, 0.01)
        yield made
    finally:
        for one in started:
            one.communicate("")


def new_key(server: Served, user: str) -> str:
    headers = {"Authorization": f"Bearer {server.key}"}
    answer = httpx.post(f"{server.host}/v1/admin/keys", json={"user": user}, headers=headers, trust_env=False)
    return str(answer.raise_for_status().json()["token"])


class Crowd:
    """Args: sizes: the clients in each process."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]], sizes: Sequence[int]) -> None:
        self._processes = processes
        self._sizes = sizes

    def forwards_per_s(self, clients: int, warm_s: float, window_s: float) -> float:
        """Traces completed per second by so many clients, all busy from before the window until after it."""
        begin = time.monotonic() + 0.05 + warm_s
        shares = [len(range(place, clients, len(self._sizes))) for place in range(len(self._sizes))]
        assert all(share <= size for share, size in zip(shares, self._sizes, strict=True))
        answers = self._ask([["forwards", share, begin, begin + window_s] for share in shares])
        return sum(count for answer in answers for count in answer) / window_s

    def generations(self, after_s: Sequence[float]) -> tuple[list[float], float]:
        """One generation a client, each beginning so many seconds from now.

        Returns: the seconds that each took, and those from now to the end of the last.
        """
        start = time.monotonic() + 0.05
        times = [start + after for after in after_s]
        answers = self._ask(
            [["generations", times[place :: len(self._sizes)]] for place in range(len(self._sizes))]
        )
        took = [0.0] * len(times)
        for place, answer in enumerate(answers):
            took[place :: len(self._sizes)] = answer
        return took, max(after + spent for after, spent in zip(after_s, took, strict=True))

    def _ask(self, questions: Sequence[list[Any]]) -> list[Any]:
        for process, question in zip(self._processes, questions, strict=True):
            assert process.stdin is not None
            print(json.dumps(question), file=process.stdin, flush=True)
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline()))
        return answers
