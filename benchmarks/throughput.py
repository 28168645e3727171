"""Jobs per second of a real small model as clients grow, each with a graph of its own, beside bare forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from crowd import Crowd, crowd
from lab import CORES, bare, smol, smol_server
from table import Row
from timing import Effort, interleaved, ratio, seconds

from client import TOKENS

FEW = 8


def measure(effort: Effort) -> Iterator[Row]:
    folder = smol()
    batch = best_batch(folder, effort.batches)
    plain, time_s = bare(folder, CORES), effort.round_s
    rows = (1, FEW, batch)
    with crowd(smol_server(), max(effort.clients)) as clients:
        measures = [partial(jobs_per_s, clients, number, time_s) for number in effort.clients]
        measures += [partial(forwards_per_s, plain, size, time_s / 3) for size in rows]
        measures.append(partial(forwards_per_s, plain, batch, time_s / 3, logits_to_keep=1))
        *ours, one, few, best, short = interleaved(effort.rounds, *measures, warm=0)
    for number, found in zip(effort.clients, ours, strict=True):
        yield Row(
            f"{number} client{'s' * (number > 1)}", f"{median(found):.1f} jobs/s",
            f"bare forward of {batch} rows, {median(best):.1f} rows/s", f"{ratio(found, best):.2f} of its rate",
            f"SmolLM2-135M, {TOKENS} tokens, clients on the same cores; with the last token's logits alone it does "
            f"{median(short):.1f}",
        )  # fmt: skip
    alone, eight = ours[0], ours[effort.clients.index(FEW)]
    yield Row(
        f"{FEW} clients beside one alone", f"{ratio(eight, alone):.1f}x",
        f"a bare forward of {FEW} rows beside one of one, {ratio(few, one):.1f}x", "",
        f"each with another intervention; one alone is {ratio(alone, one):.2f} of the bare forward's rate",
    )  # fmt: skip


def jobs_per_s(clients: Crowd, number: int, time_s: float) -> float:
    """The window is long enough for every client to have had several jobs answered."""
    return clients.forwards_per_s(number, min(0.5 + number / 32, 4), time_s * (1 + number / 64))


def forwards_per_s(plain: torch.nn.Module, rows: int, duration_s: float, **options: int) -> float:
    """Rows per second of a plain forward of so many rows."""
    ids = torch.randint(100, 40_000, (rows, TOKENS))
    spent, done = 0.0, 0
    with torch.no_grad():
        while spent < duration_s:
            spent += seconds(lambda: plain(ids, use_cache=False, **options))
            done += rows
    return done / spent


def best_batch(folder: Path, batches: Sequence[int]) -> int:
    """The number of rows at which a bare forward does most rows per second."""
    if len(batches) == 1:
        return batches[0]
    plain = bare(folder, CORES)
    forwards_per_s(plain, 1, 0.2)
    return max(batches, key=lambda rows: forwards_per_s(plain, rows, 0.5))
