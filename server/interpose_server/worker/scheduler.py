"""Which waiting jobs share the next forward. A pure function: no torch, no Redis, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..broker.waiting import Waiting


@dataclass(frozen=True, slots=True)
class Budget:
    """What one batch may hold. tokens: rows times the longest row, padding included."""

    jobs: int
    rows: int
    tokens: int
    memory_bytes: int


def choose(waiting: Sequence[Waiting], budget: Budget) -> list[str]:
    """Refs of the next batch, in the order given.

    The first job always goes, however large, so that nobody starves; the others join it, fairest first, where
    they fit.
    """
    if not waiting:
        return []
    first = waiting[0]
    chosen = [first]
    rows, longest, memory = first.footprint.rows, first.footprint.longest, first.footprint.memory_bytes
    for job in waiting[1:]:
        if len(chosen) >= budget.jobs or not _shares(first):
            break
        more_rows = rows + job.footprint.rows
        more_longest = max(longest, job.footprint.longest)
        more_memory = memory + job.footprint.memory_bytes
        fits = (
            more_rows <= budget.rows
            and more_rows * more_longest <= budget.tokens
            and more_memory <= budget.memory_bytes
        )
        if fits and _shares(job) and _alike(first, job):
            chosen.append(job)
            rows, longest, memory = more_rows, more_longest, more_memory
    return [job.ref for job in chosen]


def _shares(job: Waiting) -> bool:
    return not job.alone and not job.footprint.exclusive


def _alike(one: Waiting, other: Waiting) -> bool:
    """The same kind, attention path and need of gradients; and as many runs, or the short job would wait for the
    long one's end."""
    a, b = one.footprint, other.footprint
    return (a.kind, a.attention, a.gradients, a.runs) == (b.kind, b.attention, b.gradients, b.runs)
