"""The engine: several jobs in, one forward where they can share it, each job's values out as soon as they exist.

It knows torch and the model, and nothing of queues or networks. Local mode and the server's workers run this same
engine.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from ..errors import BadArgument, InternalError, InterposeError, OutOfMemory, ReplicaLost, first_line
from ..graph.limits import UNLIMITED, Limits
from ..graph.model import Graph, Run
from ..graph.validate import Report
from .adapters import chosen
from .generation import Generation
from .gradients import run_backwards
from .hosting import Hosting, Resting
from .interpreter import Interpreter
from .loading import Loaded
from .pieces import check_given, pieces
from .prefix import Prefix
from .prepared import Preparation, Prepared
from .refusals import Refused
from .restart import Restart
from .sink import Sink
from .split.away import Away, over, settle
from .split.calling import far
from .split.remembering import Remembered
from .split.route import HOME
from .split.sites import divide
from .stages import Member, staged
from .staging import Staging
from .tail import Tail, measure
from .world import World

log = logging.getLogger(__name__)

TOKENS = 4096
"""More in one forward gain nothing on the devices we know, and each takes memory."""


@dataclass
class EngineJob:
    """A job as the engine sees it.

    Attributes:
        attachments: digest -> tensor, for every digest the graph names.
        report: what validation found, if it was validated against this very manifest; else it is done again.
        owner: whose it is: what is kept of a graph's preparation serves its owner alone.
        prepared: what `Engine.prepare` made of it beforehand.
        saved: ids of saves that already left, in an attempt that had to be cut short.
        seeds: (run, row) -> what a generation without a seed drew from: the next attempt must draw the same.
    """

    graph: Graph
    attachments: Mapping[str, torch.Tensor]
    sink: Sink
    limits: Limits = UNLIMITED
    exclusive: bool = False
    report: Report | None = None
    owner: str = ""
    prepared: Prepared | None = None
    saved: set[int] = field(default_factory=set)
    seeds: dict[tuple[int, int], int] = field(default_factory=dict)


class Breaks(Protocol):
    """Who has a forward between two of a run's. Called on the engine's thread."""

    def due(self) -> bool:
        """Whether somebody waits for the next pause."""

    def pause(self, *, joinable: bool) -> None:
        """Time for other work, other calls of the engine's `run` included. `joinable`: whether any can join."""


class Company(Breaks, Protocol):
    """Who else comes while a generation is under way, between its steps."""

    def arrivals(self) -> Sequence[EngineJob]:
        """Jobs of one generation each that join now."""

    def ended(self, job: EngineJob, error: InterposeError | None) -> None:
        """A job is over; the others go on."""


@dataclass(frozen=True, slots=True)
class _Pace:
    """How long nobody else comes: `tokens` of one forward of several runs at most, and then a break."""

    tokens: int
    breaks: Breaks | None = None


class Engine:
    """One loaded model. `run` may be called within another call, when that has a break.

    Called from one thread; a split model's from several at once if its rows are independent, as nothing is put back
    between forwards then.

    Args:
        tokens: most of one forward that several runs share, rows times the longest of them.
    """

    def __init__(self, loaded: Loaded, tokens: int = TOKENS) -> None:
        self.loaded = loaded
        self.tokens = tokens
        self.manifest = loaded.manifest
        self._world = World(
            loaded.modules, torch.device(loaded.device), loaded.manifest, loaded.adapters, far(loaded)
        )
        self._buffers = Remembered(loaded)
        self._tail: Tail | None = measure(loaded)
        self._restart = Restart(loaded)
        self._prefix = Prefix(loaded, self._tail)
        self._prepare = Preparation(loaded.manifest)

    def run(self, jobs: Sequence[EngineJob], breaks: Breaks | None = None) -> list[InterposeError | None]:
        """Run jobs to their end, together where they can be; between any two forwards `breaks` has a pause.

        Returns:
            Each job's error, or None. A job's fault fails that job alone; nothing is raised for one.
        """
        with torch.no_grad():
            return self._together(jobs, _Pace(self.tokens, breaks))

    def host(self, jobs: Sequence[EngineJob], company: Company) -> None:
        """Run generations that others join while they are under way; jobs of one run each, none of them exclusive.

        The end of each, also of those that joined, is told to `company` as it comes. It may call `run` meanwhile.
        """
        with torch.no_grad():
            # Those that bring tensors, or must run again.
            left = self._hosted(jobs, company)
            outcomes = self._together(left, _Pace(self.tokens, company)) if left else []
            for job, outcome in zip(left, outcomes, strict=True):
                company.ended(job, outcome)

    def _hosted(self, jobs: Sequence[EngineJob], company: Company) -> list[EngineJob]:
        """Run generations that can stand beside others. Returns the jobs whose end nobody was told."""
        hosting = Hosting(self, company)
        try:
            begun = hosting.begin(jobs)
            if begun:
                with self._buffers, self.adapter(begun[0][0], 0):
                    Generation(self.loaded, self._tail, hosting).run(begun)
        except ReplicaLost:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises for all, each has its own run next
            log.warning("a shared generation failed (%s); its jobs run apart", type(error).__name__)
        finally:
            hosting.close()
        return hosting.left

    def prepare(self, job: EngineJob) -> EngineJob:
        """The job with its graph checked and compiled beforehand. May be called while another thread runs jobs.

        Raises:
            GraphError, LimitExceeded: it can't run.
        """
        return replace(job, prepared=self._prepared(job))

    def _prepared(self, job: EngineJob) -> Prepared:
        return self._prepare(job.graph, job.attachments, job.limits, job.owner, job.report)

    def rest(self, breaks: Breaks, *, joinable: bool = False) -> None:
        """A pause between two forwards. What the model remembers from one to the next is as before after it."""
        if not breaks.due():
            breaks.pause(joinable=joinable)
            return
        state = Remembered(self.loaded)
        try:
            breaks.pause(joinable=joinable)
            state.restore()
        finally:
            state.forget()

    def _together(self, jobs: Sequence[EngineJob], pace: _Pace) -> list[InterposeError | None]:
        found = self._attempt(jobs, pace)
        # Tried again only here: where an exception is handled, its traceback holds what the forward made.
        if not isinstance(found, InterposeError):
            return [self._outcome(job, run, pace) for job, run in zip(jobs, found, strict=True)]
        if isinstance(found, OutOfMemory):
            gc.collect()  # jobs that failed hold what their forward made, in circles through their errors' frames
        if len(jobs) > 1:
            half = len(jobs) // 2
            return [*self._together(jobs[:half], pace), *self._together(jobs[half:], pace)]
        others = jobs[0].graph.runs[1:]
        if isinstance(found, OutOfMemory) and any(run.rows * run.longest < pace.tokens for run in others):
            return self._together(jobs, replace(pace, tokens=pace.tokens // 4))
        return [found]

    def _attempt(
        self, jobs: Sequence[EngineJob], pace: _Pace
    ) -> list[Interpreter | InterposeError] | InterposeError:
        """Run jobs once. Returns how each ended, or the fault for which none of them counts as run."""
        started: list[Interpreter | InterposeError] = []
        running: list[Interpreter] = []
        try:
            try:
                for job in jobs:
                    started.append(begun := self.start(job))
                    if isinstance(begun, Interpreter):
                        running.append(begun)
                self._runs(running, pace)
            except BaseException:
                self.close(running)
                raise
            self.finish(running)
        except ReplicaLost:
            raise
        except Exception as error:
            name = type(error.error if isinstance(error, Refused) else error).__name__
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if len(jobs) > 1:
                log.warning("a shared run failed (%s); its %d jobs run apart", name, len(jobs))
            elif not memory:
                log.exception("a job failed that shouldn't have")
            if memory:
                return OutOfMemory("the job alone doesn't fit the device's memory")
            return InternalError(f"running it failed with {name}; this is our fault")
        return started

    def _outcome(self, job: EngineJob, run: Interpreter | InterposeError, pace: _Pace) -> InterposeError | None:
        if isinstance(run, InterposeError):
            return run
        if run.doubtful:
            (error,) = self._together([replace(job, exclusive=True)], pace)
            return error
        return run.error

    def finish(self, jobs: Sequence[Interpreter]) -> None:
        """Jobs have run: what shards still have to say of them is heard, and what was kept for them goes."""
        try:
            if self.loaded.split is not None:
                settle([job.away for job in jobs if job.away is not None], self.loaded.split.route)
        finally:
            self.close(jobs)

    def close(self, jobs: Sequence[Interpreter]) -> None:
        """What was kept for jobs goes."""
        for job in jobs:
            job.gradients.close()
        if self.loaded.split is not None:
            over([job.away for job in jobs if job.away is not None], self.loaded.split.route)

    def start(self, job: EngineJob) -> Interpreter | InterposeError:
        try:
            plan, report, attachments = job.prepared or self._prepared(job)
            check_given(job.graph, job.attachments, self.manifest)
            division = None if self.loaded.split is None else divide(plan, self.loaded.split.sites)
            started = Interpreter(
                plan,
                report.known,
                attachments,
                job.sink,
                job.limits,
                self._world,
                job.saved,
                job.seeds,
                exclusive=job.exclusive or report.footprint.exclusive,
                own=None if division is None else division.part(HOME),
            )
            if self.loaded.split is not None and division is not None:
                started.away = Away(started, job.graph, self.loaded.split, division, job.owner)
        except InterposeError as error:
            return error
        try:
            with _gradients(started):
                started.begin()
        except BaseException:
            self.close([started])
            raise
        return started

    def _runs(self, jobs: Sequence[Interpreter], pace: _Pace) -> None:
        """Run level by level: the runs of a level, of all jobs, need nothing of one another."""
        for level in range(max((len(job.plan.levels) for job in jobs), default=0)):
            shared: dict[tuple[object, ...], list[tuple[Interpreter, int]]] = {}
            for job in jobs:
                for run in job.plan.levels[level] if level < len(job.plan.levels) else ():
                    if job.plan.idle(run):
                        continue
                    if job.exclusive:
                        self._forward([(job, run)], pace)
                    else:
                        own = job.plan.graph.runs[run]
                        key = (
                            own.kind,
                            job.plan.attention(run),
                            bool(job.plan.backwards),
                            own.given,
                            self._width(own),
                            own.adapter,
                        )
                        shared.setdefault(key, []).append((job, run))
            for group in shared.values():
                self._forward(group, pace)

    def _width(self, run: Run) -> int | None:
        """What a generation's rows have in common that share a forward: they are padded on the left."""
        return run.longest if run.kind == "generate" and self.manifest.even_rows else None

    def _forward(self, group: Sequence[Member], pace: _Pace) -> None:
        group = [(job, run) for job, run in group if job.error is None]
        if not group:
            return
        with self._buffers, _gradients(*(job for job, _ in group)), self.adapter(*group[0]):
            try:
                self._feed(group, pace)
            except Refused as refused:
                (job, run), *others = group
                if others or not job.plan.graph.runs[run].given:
                    raise
                job.fail(BadArgument(f"the model doesn't run on these inputs: {first_line(refused.error)}"))

    def adapter(self, job: Interpreter, run: int) -> AbstractContextManager[None]:
        """A context in which the model is as a run has chosen it; what is run within that chooses for itself."""
        return chosen(self.loaded.adapters, job.plan.graph.runs[run].adapter)

    def _feed(self, group: Sequence[Member], pace: _Pace) -> None:
        runs = [job.plan.graph.runs[run] for job, run in group]
        if runs[0].kind == "generate":
            fed = [pieces(own, job.attachments) for own, (job, _) in zip(runs, group, strict=True)]
            guests = None if pace.breaks is None else Resting(self, pace.breaks)
            Generation(self.loaded, self._tail, guests).run(
                [(job, run, given) for (job, run), given in zip(group, fed, strict=True)]
            )
            return
        staging = Staging(self.loaded, self._tail, self._restart, self._prefix)
        with chosen({}, None):  # what the model itself can do is tried there, once for all
            stages = staged(group, self._restart, self._prefix)
        for stage in stages:
            for portion in stage.portions(pace.tokens):
                if pace.breaks is not None:
                    self.rest(pace.breaks)
                staging.run(portion)
                run_backwards([job.gradients for job in dict.fromkeys(job for job, _ in group)])
            staging.over(stage)


def _gradients(*jobs: Interpreter) -> torch.set_grad_enabled:
    """Tracks what is computed if a job asked for gradients; such jobs share forwards with their like."""
    return torch.set_grad_enabled(any(job.plan.backwards for job in jobs))
