"""Which waiting jobs share the next forward, and which have one in between. Pure functions: no torch, no Redis, no
clock. Seconds are those that `Cost` predicts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from interpose.graph.footprint import Footprint

from ..broker.waiting import Waiting
from .cost import Cost

_ROUNDING = 1 + 1e-6


@dataclass(frozen=True, slots=True)
class Budget:
    """What several jobs may come to that run together.

    Attributes:
        tokens: of one forward: rows times the longest row, padding included.
        memory_bytes: their values, what their forward takes, and their places in a cache.
        seconds: of one forward or step. A job that takes no longer by itself is small.
    """

    jobs: int
    rows: int
    tokens: int
    memory_bytes: int
    seconds: float = math.inf
    cost: Cost = field(default_factory=Cost)

    @property
    def most(self) -> int:
        """Tokens of the largest forward that several rows of runs should share."""
        cost, most = self.cost, self.tokens
        if cost.token_s:
            most = min(
                most, int((self.seconds - cost.forward_s) / cost.token_s) if self.seconds < math.inf else most
            )
        if cost.token_bytes:
            most = min(most, self.memory_bytes // cost.token_bytes)
        return max(most, 1)

    def small(self, job: Footprint) -> bool:
        """Whether a job can come in between: it has one forward, or doesn't take long."""
        return (job.kind == "trace" and job.runs == 1) or self.cost.alone(job) <= self.seconds

    def short(self, batch: Sequence[Footprint]) -> bool:
        """Whether jobs that run together are done within the time of one forward."""
        return self.takes(batch) <= self.seconds

    def takes(self, batch: Sequence[Footprint]) -> float:
        """Seconds of jobs that run together: those of the longest, and of the others' tokens."""
        return max((self.cost.alone(job) for job in batch), default=0.0) + sum(
            self.cost.token_s * job.rows * job.longest * job.runs for job in batch[1:]
        )


@dataclass(frozen=True, slots=True)
class Load:
    """A batch, as `Budget` counts.

    Attributes:
        coming, longest: rows of the forward to come, and positions of the longest.
        kept_bytes: what outlasts that forward.
    """

    jobs: int = 0
    rows: int = 0
    coming: int = 0
    longest: int = 0
    kept_bytes: int = 0
    gradients: bool = False
    generates: bool = False

    def plus(self, job: Footprint, cost: Cost) -> Load:
        generates = job.kind == "generate"
        cached = job.rows * job.longest * cost.cache_bytes if generates else 0
        return Load(
            self.jobs + 1,
            self.rows + job.rows,
            self.coming + job.rows,
            max(self.longest, _prompt(job)),
            self.kept_bytes + job.memory_bytes + cached,
            self.gradients or job.gradients,
            self.generates or generates,
        )

    def under_way(self) -> Load:
        """The same once its prompts have been run: none of their tokens is still to come."""
        return replace(self, coming=0, longest=0)

    @property
    def tokens(self) -> int:
        return self.coming * self.longest

    def seconds(self, cost: Cost) -> float:
        """Of its next forward, and of a step after it."""
        return max(
            cost.forward(self.tokens, gradients=self.gradients), cost.step(self.rows) if self.generates else 0.0
        )

    def within(self, budget: Budget) -> bool:
        cost = budget.cost
        taken = self.tokens * (cost.kept_bytes if self.gradients else cost.token_bytes)
        return (
            self.jobs <= budget.jobs
            and self.rows <= budget.rows
            and self.tokens <= budget.tokens
            and self.kept_bytes + taken <= budget.memory_bytes
            and self.seconds(cost) <= budget.seconds
        )


class Place(Enum):
    """Where jobs come in while others run."""

    JOINS = "they generate beside those that do"
    ASIDE = "between two forwards of the others, to their end"
    NEXT = "when the others are done"


@dataclass(frozen=True, slots=True)
class Turn:
    """What comes while a batch is under way. `refs`: the jobs, in the order given."""

    refs: Sequence[str] = ()
    place: Place = Place.NEXT


@dataclass(frozen=True, slots=True)
class UnderWay:
    """What runs.

    Attributes:
        jobs: those on it.
        joinable: whether a generation can join them.
        served: users who had their share of that already.
        ending: whether it's time to get the next batch ready.
        ahead: jobs that are to be the next batch already.
    """

    jobs: Sequence[Footprint]
    joinable: bool = False
    served: Collection[str] = ()
    ending: bool = False
    ahead: Sequence[Footprint] = ()


def choose(waiting: Sequence[Waiting], budget: Budget) -> list[str]:
    """Refs of the next batch, in the order given.

    The first job always goes, however large, so that nobody starves; the others join it, fairest first, where
    they fit, and where they are so alike in length that it takes less time together than apart.
    """
    if not waiting:
        return []
    first, *others = waiting
    if not _shares(first):
        return [first.ref]
    alike = [job for job in others if _shares(job) and like_each_other(first.footprint, job.footprint)]
    plan = first.footprint.kind == "trace"
    if plan:
        lengths = _together([first, *alike], budget)
        alike = [job for job in alike if job.footprint.longest in lengths]
    load = Load().plus(first.footprint, budget.cost)
    return [first.ref, *_joining(alike, load, first.footprint, budget, paying=not plan)]


def between(waiting: Sequence[Waiting], under_way: UnderWay, budget: Budget) -> Turn:
    """Who comes while others run.

    Generations join if the fairest job of all can: what must wait for the end waits no longer for those that came
    later. Small jobs have their forwards in between, whoever else waits: they wait for one, not for hundreds.
    What comes to the end of a batch is made ready to be the next.
    """
    if not waiting or not under_way.jobs:
        return Turn()
    running = under_way.jobs
    load = Load()
    for footprint in running:
        load = load.plus(footprint, budget.cost)
    if under_way.joinable:
        refs = _joining(waiting, load.under_way(), running[0], budget)
        if waiting[0].ref in refs:
            return Turn(refs, Place.JOINS)
    if not under_way.ending:
        small = [job for job in waiting if _comes_aside(job, under_way, budget)]
        room = replace(budget, memory_bytes=max(budget.memory_bytes - load.kept_bytes, 0))
        return Turn(choose(small, room), Place.ASIDE)
    return Turn(_ahead(waiting, under_way.ahead, budget))


def batches(jobs: Sequence[Waiting], budget: Budget) -> list[list[str]]:
    """All of them, in batches that run one after another."""
    left, found = list(jobs), []
    while left:
        found.append(choose(left, budget))
        left = [job for job in left if job.ref not in found[-1]]
    return found


def _comes_aside(job: Waiting, under_way: UnderWay, budget: Budget) -> bool:
    return not job.alone and job.user not in under_way.served and budget.small(job.footprint)


def _ahead(waiting: Sequence[Waiting], ahead: Sequence[Footprint], budget: Budget) -> list[str]:
    """Jobs for the next batch; those that belong to it already stay. Not one under suspicion: it dies alone."""
    if not ahead:
        first = waiting[0]
        fits = Load().plus(first.footprint, budget.cost).within(budget)
        return choose(waiting, budget) if fits and not first.alone else []
    load = Load()
    for footprint in ahead:
        load = load.plus(footprint, budget.cost)
    return _joining(waiting, load, ahead[0], budget)


def _joining(
    waiting: Sequence[Waiting], load: Load, like: Footprint, budget: Budget, *, paying: bool = True
) -> list[str]:
    """Those that fit beside what a batch holds; `paying`: and take no longer there than by themselves."""
    refs = []
    for job in waiting:
        more = load.plus(job.footprint, budget.cost)
        if not (_shares(job) and like_each_other(like, job.footprint) and more.within(budget)):
            continue
        apart = load.seconds(budget.cost) + _apart(job.footprint, budget)
        if paying and load.tokens and more.seconds(budget.cost) > apart * _ROUNDING:
            continue
        refs.append(job.ref)
        load = more
    return refs


def _apart(job: Footprint, budget: Budget) -> float:
    """Seconds of a job's forward without others."""
    return budget.cost.forward(job.rows * _prompt(job), gradients=job.gradients)


def _together(jobs: Sequence[Waiting], budget: Budget) -> set[int]:
    """The lengths that go with the first job's, jobs in groups of neighbours, so that all take least time.

    A group of more tokens than the budget's takes several forwards.
    """
    rows: dict[int, int] = {}
    for job in jobs:
        rows[job.footprint.longest] = rows.get(job.footprint.longest, 0) + job.footprint.rows
    lengths, own = sorted(rows), jobs[0].footprint.longest
    cost = budget.cost
    best: list[tuple[float, int]] = [(0.0, 0)]
    """By how many of the shortest: the least time, and where their last group begins."""
    for end, longest in enumerate(lengths, 1):
        together, options = 0, []
        for start in range(end - 1, -1, -1):
            together += rows[lengths[start]]
            tokens = together * longest
            forwards = max(math.ceil(tokens / budget.tokens), 1)
            options.append((best[start][0] + forwards * cost.forward_s + tokens * cost.token_s, start))
        best.append(min(options))
    end = len(lengths)
    while end:
        start = best[end][1]
        if own >= lengths[start]:
            return set(lengths[start:end])
        end = start
    return {own}


def _prompt(job: Footprint) -> int:
    """Positions of the first forward's longest row."""
    return max(job.longest - job.steps, 1) if job.kind == "generate" and job.runs == 1 else job.longest


def _shares(job: Waiting) -> bool:
    return not job.alone and not job.footprint.exclusive


def like_each_other(one: Footprint, other: Footprint) -> bool:
    """The same kind, attention path, need of gradients and adapters; and as many runs, or the short job would wait
    for the long one's end."""
    return _kind(one) == _kind(other)


def _kind(job: Footprint) -> tuple[object, ...]:
    return job.kind, job.attention, job.gradients, job.runs, job.adapters
