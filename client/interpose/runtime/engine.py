"""The engine: several jobs in, one forward where they can share it, each job's values out as soon as they exist.

It knows torch and the model, and nothing of queues or networks. Local mode and the server's workers run this same
engine.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..errors import BadArgument, InternalError, InterposeError, OutOfMemory
from ..graph.inputs import counted
from ..graph.limits import UNLIMITED, Limits
from ..graph.model import Graph, Run
from ..graph.validate import Report
from .forward import Forward, Placed, place, starts
from .generation import Begun, Generation
from .gradients import run_backwards
from .independence import Buffers
from .inputs import ModelInputs, call_kwargs
from .interpreter import Interpreter
from .loading import Loaded
from .pieces import check_given, joined, pieces
from .plan import Place
from .prefix import Keeping, Parts, Past, Prefix, behind
from .prepared import Preparation, Prepared
from .refusals import Refused, refusing
from .restart import Made, Restart
from .rows import Span
from .sink import Sink
from .stages import ALL, Member, Rows, Stage, staged
from .tail import Cut, Tail, measure
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
    """One loaded model. Called from one thread; `run` may be called within another call, when that has a break.

    Args:
        tokens: most of one forward that several runs share, rows times the longest of them.
    """

    def __init__(self, loaded: Loaded, tokens: int = TOKENS) -> None:
        self.loaded = loaded
        self.tokens = tokens
        self.manifest = loaded.manifest
        self._world = World(loaded.modules, torch.device(loaded.device), loaded.manifest)
        self._buffers = Buffers(loaded.model)
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
            hosting = Hosting(self, company)
            try:
                begun = hosting.begin(jobs)
                if begun:
                    with self._buffers:
                        Generation(self.loaded, self._tail, hosting).run(begun)
            except Exception as error:  # noqa: BLE001 - whatever a model raises for all, each has its own run next
                log.warning("a shared generation failed (%s); its jobs run apart", type(error).__name__)
            # Those that bring tensors, or must run again.
            left = hosting.left
            outcomes = self._together(left, _Pace(self.tokens, company)) if left else []
            for job, outcome in zip(left, outcomes, strict=True):
                company.ended(job, outcome)

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
        state = Buffers(self.loaded.model)
        breaks.pause(joinable=joinable)
        state.restore()

    def _together(self, jobs: Sequence[EngineJob], pace: _Pace) -> list[InterposeError | None]:
        try:
            started = [self.start(job) for job in jobs]
            running = [job for job in started if isinstance(job, Interpreter)]
            try:
                self._runs(running, pace)
            finally:
                for job in running:
                    job.gradients.close()
        except Exception as error:
            if len(jobs) > 1:
                log.warning("a shared run failed (%s); its %d jobs run apart", type(error).__name__, len(jobs))
                return self._apart(jobs, pace)
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                if any(run.rows * run.longest < pace.tokens for run in jobs[0].graph.runs[1:]):
                    return self._together(jobs, replace(pace, tokens=pace.tokens // 4))
                return [OutOfMemory("the job alone doesn't fit the device's memory")]
            log.exception("a job failed that shouldn't have")
            fault = error.error if isinstance(error, Refused) else error
            return [InternalError(f"running it failed with {type(fault).__name__}; this is our fault")]
        return [self._outcome(job, run, pace) for job, run in zip(jobs, started, strict=True)]

    def _outcome(self, job: EngineJob, run: Interpreter | InterposeError, pace: _Pace) -> InterposeError | None:
        if isinstance(run, InterposeError):
            return run
        if run.doubtful:
            (error,) = self._together([replace(job, exclusive=True)], pace)
            return error
        return run.error

    def _apart(self, jobs: Sequence[EngineJob], pace: _Pace) -> list[InterposeError | None]:
        half = len(jobs) // 2
        return [*self._together(jobs[:half], pace), *self._together(jobs[half:], pace)]

    def start(self, job: EngineJob) -> Interpreter | InterposeError:
        try:
            plan, report, attachments = job.prepared or self._prepared(job)
            check_given(job.graph, job.attachments, self.manifest)
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
            )
        except InterposeError as error:
            return error
        with _gradients(started):
            started.begin()
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
        with self._buffers, _gradients(*(job for job, _ in group)):
            try:
                self._feed(group, pace)
            except Refused as refused:
                (job, run), *others = group
                if others or not job.plan.graph.runs[run].given:
                    raise
                job.fail(BadArgument(f"the model doesn't run on these inputs: {_first_line(refused.error)}"))

    def _feed(self, group: Sequence[Member], pace: _Pace) -> None:
        runs = [job.plan.graph.runs[run] for job, run in group]
        if runs[0].kind == "generate":
            fed = [pieces(own, job.attachments) for own, (job, _) in zip(runs, group, strict=True)]
            guests = None if pace.breaks is None else _Resting(self, pace.breaks)
            Generation(self.loaded, self._tail, guests).run(
                [(job, run, given) for (job, run), given in zip(group, fed, strict=True)]
            )
            return
        made: dict[tuple[Rows, int], Made] = {}
        pasts: dict[Rows, Past] = {}
        for stage in staged(group, self._restart, self._prefix):
            for portion in stage.portions(pace.tokens):
                if pace.breaks is not None:
                    self.rest(pace.breaks)
                self._stage(portion, made, pasts)
                run_backwards([job.gradients for job in dict.fromkeys(job for job, _ in group)])
            made = {key: value for key, value in made.items() if key[1] != stage.block}
            if stage.skip:
                pasts.clear()  # those of other sizes come after it

    def _stage(self, stage: Stage, made: dict[tuple[Rows, int], Made], pasts: dict[Rows, Past]) -> None:
        """One forward.

        Args:
            made: by rows and block, what was made before that block for rows of later stages.
            pasts: what rows made of first tokens for those that begin behind them.
        """
        seated = [rows for rows in stage.rows if not rows.over]
        if not seated:
            return
        jobs = [rows.seats[0].member[0] for rows in seated]
        runs = [rows.run for rows in seated]
        fed = [pieces(run, job.attachments) for run, job in zip(runs, jobs, strict=True)]
        if stage.skip:
            fed = [[behind(piece, stage.skip) for piece in own] for own in fed]
        inputs = joined(fed, self.manifest.inputs, self._world.device)
        if stage.skip:
            inputs = self._prefix.behind(inputs, stage.skip)
        rows, width = inputs.attention_mask.shape
        images = [self._images(own.seats[0].member) for own in seated]
        where = zip(starts([run.rows for run in runs]), starts(list(map(sum, images))), strict=True)
        spans = [
            Span(row, own.rows, 0, length, 0, length, image, sum(counts))
            for (row, image), own, counts, length in zip(
                where, runs, images, [stage.skip + own for own in inputs.widths], strict=True
            )
        ]
        placed = [
            place(*seat.member, span, images=self._images(seat.member), since=seat.since, until=seat.until)
            for own, span in zip(seated, spans, strict=True)
            for seat in own.seats
            if seat.until > seat.since
        ]
        whole = Span.whole(rows, width, width, sum(map(sum, images)))
        for part in placed if not stage.block else ():
            part.give_mask(inputs.attention_mask)
        begun = None
        if stage.block:
            origins = [made[own.origin, stage.block] for own in seated if own.origin]
            layout = self._restart.layout(stage.block)
            begun = self._restart.begun(stage.block, Made.joined(origins, layout, spans, whole))
        cut = self._cut(placed, inputs, stage.skip)
        of = dict(zip(seated, spans, strict=True))
        kept = self._kept(of, made)
        kwargs = self._kwargs(inputs, plain=any(job.exclusive for job in jobs))
        keeping = Keeping(self._prefix, of, stage.keep) if stage.keep else None
        first: Mapping[Place, Parts] = {}
        if keeping is not None:
            kept |= keeping.places
            kwargs |= keeping.arguments
        if stage.skip:
            before = [pasts[own.origin] for own in seated if own.origin]
            kwargs |= self._prefix.begin(before)
            begins = [replace(span, length=stage.skip) for span in spans]
            first = self._prefix.first(before, begins, replace(whole, length=stage.skip))
        forward = Forward(self.loaded, placed, whole, cut=cut, kept=kept, begun=begun, first=first)
        with refusing(lambda: forward.serving):
            forward.run(kwargs | (cut.argument if cut else {}))
        forward.finish()
        if keeping is not None:
            pasts |= keeping.pasts()

    def _images(self, member: Member) -> list[int]:
        """How many images each invoke of a run has; runs of the same rows may have other invokes."""
        job, run = member
        graph = job.plan.graph
        return [counted(invoke, self.manifest.inputs, graph.attachments) for invoke in graph.runs[run].invokes]

    def _kept(
        self, spans: Mapping[Rows, Span], made: dict[tuple[Rows, int], Made]
    ) -> dict[Place, Callable[[Any], None]]:
        """Where a forward is to keep what it makes for later stages."""

        def keep(block: int) -> Callable[[Any], None]:
            def seen(nest: Any) -> None:
                for rows, span in spans.items():
                    if block in rows.kept:
                        made[rows, block] = Made.of(nest, self._restart.layout(block), span)

            return seen

        blocks = frozenset[int]().union(*(rows.kept for rows in spans))
        return {self._restart.exit_of(block): keep(block) for block in blocks}

    def _cut(self, placed: Sequence[Placed], inputs: ModelInputs, before: int) -> Cut | None:
        """Drop the logits nobody looks at, in a forward that several runs share, or that begins behind tokens."""
        if (len(placed) == 1 and not before) or self._tail is None or any(part.job.exclusive for part in placed):
            return None
        reads = [(part.job, self._tail.last_only(part.job.plan, part.run)) for part in placed if part.until == ALL]
        if any(nodes is None for _, nodes in reads) or not any(nodes for _, nodes in reads):
            return None
        for job, nodes in reads:
            job.narrowed |= nodes or frozenset()
        return Cut(self._tail, inputs.widths, before)

    def _kwargs(self, inputs: ModelInputs, *, plain: bool) -> dict[str, Any]:
        kwargs: dict[str, Any] = call_kwargs(self.loaded, inputs)
        if plain or "use_cache" not in self.loaded.feeding.accepts:
            return kwargs
        # One forward reads no cache; without one its keys and values die with their layer. They also lie otherwise
        # in memory, which changes last bits.
        return kwargs | {"use_cache": False}


class Hosting:
    """The jobs of one hosted generation: which run is whose."""

    def __init__(self, engine: Engine, company: Company) -> None:
        self._engine = engine
        self._company = company
        self._jobs: dict[Interpreter, EngineJob] = {}
        self._left: list[EngineJob] = []

    @property
    def left(self) -> list[EngineJob]:
        """Jobs whose end nobody was told."""
        return [*self._left, *self._jobs.values()]

    def begin(self, jobs: Sequence[EngineJob]) -> list[Begun]:
        begun: list[Begun] = []
        ahead = deque(jobs)
        try:
            while ahead:
                job = ahead[0]
                started = self._engine.start(job)
                if isinstance(started, InterposeError):
                    self._company.ended(job, started)
                elif started.error is not None or started.plan.idle(0):
                    self._company.ended(job, started.error)
                elif self._by_itself(started):
                    self._left.append(job)
                else:
                    self._jobs[started] = job
                    begun.append((started, 0, pieces(started.plan.graph.runs[0], job.attachments)))
                ahead.popleft()
        finally:
            self._left += ahead  # none is lost where one finds no memory to begin with
        return begun

    def _by_itself(self, job: Interpreter) -> bool:
        """Whether a job can't stand beside others."""
        # Rows that come and go are padded on the left.
        padded = bool(self._engine.manifest.even_rows)
        return padded or job.exclusive or bool(job.plan.graph.runs[0].given)

    def pause(self, *, joinable: bool) -> None:
        self._engine.rest(self._company, joinable=joinable and not self._left)

    def arrivals(self) -> list[Begun]:
        """Nobody once some wait for the end, or it might never come."""
        return [] if self._left else self.begin(self._company.arrivals())

    def refused(self, begun: Sequence[Begun]) -> None:
        self._left += [self._jobs.pop(job) for job, _, _ in begun if job in self._jobs]

    def ended(self, job: Interpreter) -> None:
        self._company.ended(self._jobs.pop(job), job.error)


@dataclass(frozen=True)
class _Resting:
    """The guests of a generation that nobody joins: breaks between its steps."""

    engine: Engine
    breaks: Breaks

    def pause(self, *, joinable: bool) -> None:
        self.engine.rest(self.breaks)

    def arrivals(self) -> Sequence[Begun]:
        return ()

    def refused(self, begun: Sequence[Begun]) -> None:
        """Nobody came."""

    def ended(self, job: Interpreter) -> None:
        """It is told of with the others of its batch."""


def _gradients(*jobs: Interpreter) -> torch.set_grad_enabled:
    """Tracks what is computed if a job asked for gradients; such jobs share forwards with their like."""
    return torch.set_grad_enabled(any(job.plan.backwards for job in jobs))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
