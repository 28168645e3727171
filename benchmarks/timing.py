"""Timing on a machine that others use too: what is compared runs in turns, and ratios are taken turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(rounds: int, *measures: Callable[[], float], warm: int = 1) -> list[list[float]]:
    """What each measure gave in each round. The order turns round, so that no measure always follows another."""
    found: list[list[float]] = [[] for _ in measures]
    for turn in range(-warm, rounds):
        order = list(range(len(measures)))
        shift = turn % len(order)
        for index in order[shift:] + order[:shift]:
            value = measures[index]()
            if turn >= 0:
                found[index].append(value)
    return found


def ratio(ours: Sequence[float], beside: Sequence[float]) -> float:
    """The median over the rounds of one round's ratio."""
    return median(a / b for a, b in zip(ours, beside, strict=True))


def added(ours: Sequence[float], beside: Sequence[float]) -> float:
    """The median over the rounds of one round's difference."""
    return median(a - b for a, b in zip(ours, beside, strict=True))


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


@dataclass(frozen=True)
class Effort:
    """How often things are repeated, and for how long: `make bench` or `--quick`."""

    traces: int
    transfers: int
    large_transfers: int
    locals: int
    starts: int
    rounds: int
    round_s: float
    batches: tuple[int, ...]
    clients: tuple[int, ...]
    generations: int
    arrivals: int
    steerings: int
    reads: int
    sweeps: int
    loop_layers: int


FULL = Effort(
    **{"traces": 300, "transfers": 15, "large_transfers": 4, "locals": 200, "starts": 3},
    **{"rounds": 4, "round_s": 3.0, "batches": (8, 16, 32, 64), "clients": (1, 8, 32, 128)},
    **{"generations": 4, "arrivals": 3, "steerings": 15, "reads": 60, "sweeps": 3, "loop_layers": 6},
)
QUICK = Effort(
    **{"traces": 60, "transfers": 4, "large_transfers": 1, "locals": 40, "starts": 1},
    **{"rounds": 1, "round_s": 1.5, "batches": (32,), "clients": (1, 8, 32)},
    **{"generations": 1, "arrivals": 0, "steerings": 4, "reads": 15, "sweeps": 1, "loop_layers": 1},
)
