"""Which waiting jobs share the next forward. Pure functions: no torch, no Redis, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from interpose.graph.footprint import Footprint

from ..broker.waiting import Waiting


@dataclass(frozen=True, slots=True)
class Budget:
    """What one batch may hold. tokens: rows times the longest row, padding included."""

    jobs: int
    rows: int
    tokens: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """A batch, as `Budget` counts."""

    jobs: int = 0
    rows: int = 0
    longest: int = 0
    memory_bytes: int = 0

    def plus(self, job: Footprint) -> Load:
        return Load(
            self.jobs + 1,
            self.rows + job.rows,
            max(self.longest, job.longest),
            self.memory_bytes + job.memory_bytes,
        )

    def within(self, budget: Budget) -> bool:
        return (
            self.jobs <= budget.jobs
            and self.rows <= budget.rows
            and self.rows * self.longest <= budget.tokens
            and self.memory_bytes <= budget.memory_bytes
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """What comes between two steps of a generation.

    Attributes:
        refs: the jobs, in the order given.
        joins: they generate with it; else they run to their end while it waits.
    """

    refs: Sequence[str] = ()
    joins: bool = False


def choose(waiting: Sequence[Waiting], budget: Budget) -> list[str]:
    """Refs of the next batch, in the order given.

    The first job always goes, however large, so that nobody starves; the others join it, fairest first, where
    they fit.
    """
    if not waiting:
        return []
    first = waiting[0]
    if not _shares(first):
        return [first.ref]
    return [first.ref, *_joining(waiting[1:], Load().plus(first.footprint), first.footprint, budget)]


def between(
    waiting: Sequence[Waiting], running: Sequence[Footprint], budget: Budget, *, joinable: bool = True
) -> Turn:
    """Who is next while a generation is under way.

    The fairest job decides. One that generates joins if there is room, and others behind it; if there is none, or
    it must be alone, nobody joins any more, and it is next when the generation ends. Jobs of single forwards have
    them now: they wait for one step, not for hundreds.

    Args:
        running: what is on it.
        joinable: whether any can join.
    """
    if not waiting or not running:
        return Turn()
    first = waiting[0]
    if first.footprint.kind == "trace" and not first.alone:
        room = replace(budget, memory_bytes=budget.memory_bytes - sum(job.memory_bytes for job in running))
        return Turn(choose([job for job in waiting if job.footprint.kind == "trace"], room))
    if not joinable:
        return Turn()
    load = Load()
    for footprint in running:
        load = load.plus(footprint)
    refs = _joining(waiting, load, running[0], budget)
    return Turn(refs, joins=True) if first.ref in refs else Turn()


def _joining(waiting: Sequence[Waiting], load: Load, like: Footprint, budget: Budget) -> list[str]:
    """Those that fit a batch beside what it holds already."""
    refs = []
    for job in waiting:
        more = load.plus(job.footprint)
        if _shares(job) and _alike(like, job.footprint) and more.within(budget):
            refs.append(job.ref)
            load = more
    return refs


def _shares(job: Waiting) -> bool:
    return not job.alone and not job.footprint.exclusive


def _alike(one: Footprint, other: Footprint) -> bool:
    """The same kind, attention path and need of gradients; and as many runs, or the short job would wait for the
    long one's end."""
    return (one.kind, one.attention, one.gradients, one.runs) == (
        other.kind,
        other.attention,
        other.gradients,
        other.runs,
    )
