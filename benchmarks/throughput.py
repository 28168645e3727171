"""Jobs per second of a real small model as clients grow, beside the bare batched forward."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from lab import SMOL, bare, served, smol
from serving import Served
from table import Row
from timing import Effort, interleaved, ratio, seconds

from client import TOKENS

CORES = len(os.sched_getaffinity(0))
CLIENTS = (1, 8, 32)


def measure(effort: Effort) -> Iterator[Row]:
    folder = smol()
    batch = best_batch(folder, effort.batches)
    with served(SMOL, folder) as server, clients(server, max(CLIENTS)) as crowd:
        plain = bare(folder, CORES)
        measures = [partial(jobs_per_s, crowd[:number], effort.round_s) for number in CLIENTS]
        measures.append(partial(forwards_per_s, plain, batch, effort.round_s / 2))
        *ours, beside = interleaved(effort.rounds, *measures, warm=0)
    for number, found in zip(CLIENTS, ours, strict=True):
        relation = f"{ratio(found, beside):.2f} of its rate"
        if number > 1:
            relation += f", {ratio(found, ours[0]):.1f}x one client"
        yield Row(
            f"{number} client{'s' * (number > 1)}", f"{median(found):.1f} jobs/s",
            f"bare forward of {batch} rows, {median(beside):.1f} rows/s", relation,
            f"SmolLM2-135M, {TOKENS} tokens, a process each on the same cores",
        )  # fmt: skip


@contextmanager
def clients(server: Served, number: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Client processes, each having run a job."""
    script = Path(__file__).with_name("client.py")
    crowd = [
        subprocess.Popen(
            [sys.executable, script, server.host, server.key, SMOL, str(index)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for index in range(number)
    ]  # fmt: skip
    try:
        jobs_per_s(crowd, 0.01)
        yield crowd
    finally:
        for one in crowd:
            one.communicate("")


def jobs_per_s(crowd: Sequence[subprocess.Popen[str]], duration_s: float) -> float:
    for one in crowd:
        assert one.stdin is not None
        one.stdin.write(f"{duration_s}\n")
        one.stdin.flush()
    total = 0.0
    for one in crowd:
        assert one.stdout is not None
        jobs, spent = one.stdout.readline().split()
        total += int(jobs) / float(spent)
    return total


def forwards_per_s(plain: torch.nn.Module, rows: int, duration_s: float) -> float:
    """Rows per second of a plain forward of so many rows."""
    ids = torch.randint(100, 40_000, (rows, TOKENS))
    spent, done = 0.0, 0
    with torch.no_grad():
        while spent < duration_s:
            spent += seconds(lambda: plain(ids, use_cache=False))
            done += rows
    return done / spent


def best_batch(folder: Path, batches: Sequence[int]) -> int:
    """The number of rows at which a bare forward does most rows per second."""
    if len(batches) == 1:
        return batches[0]
    plain = bare(folder, CORES)
    forwards_per_s(plain, 1, 0.2)
    return max(batches, key=lambda rows: forwards_per_s(plain, rows, 0.5))
