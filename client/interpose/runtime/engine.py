"""The engine: several jobs in, one forward where they can share it, each job's values out as soon as they exist.

It knows torch and the model, and nothing of queues or networks. Local mode and the server's workers run this same
engine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InternalError, InterposeError, NotReached, OutOfMemory
from ..graph.limits import UNLIMITED, Limits
from ..graph.manifest import EVENT
from ..graph.model import Graph, Node
from ..graph.validate import Report, validate
from .hooks import hooked
from .independence import Buffers
from .inputs import ModelInputs, batch_inputs, call_kwargs
from .interpreter import Interpreter, Sink, World
from .loading import Loaded
from .plan import Place, compile_graph
from .rows import Span
from .slots import Touched

log = logging.getLogger(__name__)


@dataclass
class EngineJob:
    """A job as the engine sees it.

    Attributes:
        attachments: digest -> tensor, for every digest the graph names.
        report: what validation found, if it was validated against this very manifest; else it is done again.
        saved: ids of saves that already left, in an attempt that had to be cut short.
    """

    graph: Graph
    attachments: Mapping[str, torch.Tensor]
    sink: Sink
    limits: Limits = UNLIMITED
    exclusive: bool = False
    report: Report | None = None
    saved: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Placed:
    """One job's run within a forward: its block of rows, and each invoke's part of it."""

    job: Interpreter
    run: int
    span: Span
    invokes: tuple[Span, ...]


class Engine:
    """One loaded model. Not reentrant: one call of `run` at a time."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.manifest = loaded.manifest
        self._world = World(loaded.modules, torch.device(loaded.device))
        self._buffers = Buffers(loaded.model)

    def run(self, jobs: Sequence[EngineJob]) -> list[InterposeError | None]:
        """Run jobs to their end, together where they can be.

        Returns:
            Each job's error, or None. A job's fault fails that job alone; nothing is raised for one.
        """
        with torch.no_grad():
            return self._together(jobs)

    def _together(self, jobs: Sequence[EngineJob]) -> list[InterposeError | None]:
        started = [self._start(job) for job in jobs]
        try:
            self._runs(jobs, [job for job in started if isinstance(job, Interpreter)])
        except Exception as error:
            if len(jobs) > 1:
                log.warning("a shared forward failed (%s); its %d jobs run apart", type(error).__name__, len(jobs))
                return self._apart(jobs)
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                return [OutOfMemory("the job alone doesn't fit the device's memory")]
            log.exception("the model's forward failed")
            return [InternalError(f"the model's forward failed with {type(error).__name__}")]
        return [job.error if isinstance(job, Interpreter) else job for job in started]

    def _apart(self, jobs: Sequence[EngineJob]) -> list[InterposeError | None]:
        half = len(jobs) // 2
        return [*self._together(jobs[:half]), *self._together(jobs[half:])]

    def _start(self, job: EngineJob) -> Interpreter | InterposeError:
        try:
            report = job.report or validate(job.graph, self.manifest, job.limits)
            plan = compile_graph(job.graph)
            started = Interpreter(
                plan, report.known, job.attachments, job.sink, job.limits, self._world, job.saved,
                exclusive=job.exclusive or report.footprint.exclusive,
            )  # fmt: skip
        except InterposeError as error:
            return error
        started.begin()
        return started

    def _runs(self, jobs: Sequence[EngineJob], started: Sequence[Interpreter]) -> None:
        for index in range(max((len(job.graph.runs) for job in jobs), default=0)):
            shared: dict[bool, list[Interpreter]] = {}
            for job in started:
                if job.error is not None or index >= len(job.plan.graph.runs):
                    continue
                if (index, 0) not in job.plan.accesses and index not in job.plan.masks:
                    continue
                if job.exclusive:
                    self._forward([job], index)
                else:
                    shared.setdefault(job.plan.attention(index), []).append(job)
            for group in shared.values():
                self._forward(group, index)

    def _forward(self, jobs: Sequence[Interpreter], index: int) -> None:
        runs = [job.plan.graph.runs[index] for job in jobs]
        inputs = batch_inputs(
            [[row for invoke in run.invokes for row in invoke.rows] for run in runs], self._world.device
        )
        placed = [
            place(job, index, row) for job, row in zip(jobs, _starts([run.rows for run in runs]), strict=True)
        ]
        forward = Forward(self.loaded, placed, inputs)
        for part in placed:
            self._give_masks(part, inputs)
        touched = {name: self._world.modules[name] for name, _, _ in forward.waiting}
        with self._buffers, hooked(touched, self.loaded.names, forward):
            try:
                if touched:
                    self.loaded.model(**self._kwargs(inputs))
            except _Enough:
                pass
        forward.finish()

    def _kwargs(self, inputs: ModelInputs) -> dict[str, Any]:
        kwargs: dict[str, Any] = call_kwargs(self.loaded, inputs)
        # One forward reads no cache; without one its keys and values die with their layer.
        return kwargs | {"use_cache": False} if "use_cache" in self.loaded.feeding.accepts else kwargs

    def _give_masks(self, part: Placed, inputs: ModelInputs) -> None:
        for node in part.job.plan.masks.get(part.run, ()):
            span = part.span if node.invoke is None else _shifted(part.invokes[node.invoke], part.span)
            mask = inputs.attention_mask[span.row : span.row + span.rows, span.start : span.start + span.length]
            with part.job.guard():
                part.job.provide(node.id, mask)


class _Enough(Exception):
    """Nobody needs what comes after this point of the forward."""


class Forward:
    """One forward of the model, shared by the runs placed in it. A `Visitor` of its hooks."""

    def __init__(self, loaded: Loaded, placed: Sequence[Placed], inputs: ModelInputs) -> None:
        self.loaded = loaded
        self.rows, self.total = inputs.input_ids.shape
        self.waiting: dict[Place, list[tuple[Placed, tuple[Node, ...]]]] = {}
        for part in placed:
            for at, nodes in part.job.plan.accesses.get((part.run, 0), {}).items():
                self.waiting.setdefault(at, []).append((part, nodes))
        self.attention = any(event not in EVENT.values() for _, event, _ in self.waiting)

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        parts = self.waiting.pop((module, event, call), None)
        if parts is None:
            return value
        layout = self.loaded.manifest.modules[module].points[_POINT.get(event, event)]
        touched = Touched(value, layout, self.rows, self.total, (module, event) in self.loaded.rewritten)
        for part, nodes in parts:
            if part.job.error is None:
                part.job.fire(nodes, touched, part.span, part.invokes)
        if all(part.job.error for entries in self.waiting.values() for part, _ in entries):
            raise _Enough
        return touched.result()

    def finish(self) -> None:
        """Fail the jobs that still wait for a point: the forward is over and never came there."""
        for entries in self.waiting.values():
            for part, nodes in entries:
                node = nodes[0]
                reason = f"this forward never came to {node.point}"
                part.job.fail(NotReached(reason, node=node.id, op=node.op, source=node.source))


_POINT = {event: name for name, event in EVENT.items()}


def place(job: Interpreter, index: int, row: int) -> Placed:
    """Where a run lies in a forward whose rows from `row` on are its own."""
    run = job.plan.graph.runs[index]
    starts = _starts([len(invoke.rows) for invoke in run.invokes])
    invokes = tuple(
        Span(start, len(invoke.rows), run.longest - invoke.longest, invoke.longest)
        for start, invoke in zip(starts, run.invokes, strict=True)
    )
    return Placed(job, index, Span(row, run.rows, 0, run.longest), invokes)


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts


def _shifted(invoke: Span, run: Span) -> Span:
    return Span(run.row + invoke.row, invoke.rows, run.start + invoke.start, invoke.length)
