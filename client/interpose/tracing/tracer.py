"""The blocks a user opens: `with model.trace(prompt) as t:` and `with t.invoke(prompt):` inside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol

from ..errors import BadArgument, DeferredError, InterposeError, NotSaved
from ..graph.manifest import Manifest
from ..graph.model import Graph
from .prompts import Tokenize, to_invoke
from .recorder import Recorder


class Model(Protocol):
    """What handles and tracers need of a model."""

    def _tree(self) -> Manifest:
        """The manifest names are looked up in: the open block's, else any."""

    def _recording(self) -> Recorder:
        """The open block's recorder. Raises DeferredError outside one."""


@dataclass(frozen=True)
class Options:
    """How a block is run. `timeout`: seconds, None for the configured one."""

    remote: bool = False
    blocking: bool = True
    timeout: float | None = None
    batching: Literal["auto", "exclusive"] = "auto"


class Handle(Protocol):
    """A submitted job."""

    @property
    def id(self) -> str: ...

    @property
    def status(self) -> Any: ...

    def result(self, timeout: float | None = None) -> Mapping[int, Any]: ...

    def cancel(self) -> Any: ...


class Execute(Protocol):
    """Runs a graph; with `blocking` gives the saved values by node, else the job that will have them."""

    def __call__(
        self, graph: Graph, tensors: Mapping[str, Any], options: Options
    ) -> Mapping[int, Any] | Handle: ...


ACTIVE: ContextVar[Tracer | None] = ContextVar("interpose_tracer", default=None)


class Tracer:
    """One forward of the model with everything to be read and changed in it.

    Nothing runs until the block is left; then saved values become real. An error raised in the block runs nothing.
    """

    def __init__(
        self,
        model: Model,
        recorder: Recorder,
        prompt: Any,
        tokenize: Tokenize,
        execute: Execute,
        options: Options,
    ) -> None:
        self.model = model
        self.recorder = recorder
        self._prompt = prompt
        self._tokenize = tokenize
        self._execute = execute
        self._options = options
        self._job: Handle | None = None
        self._token: Any = None

    def __enter__(self) -> Tracer:
        if ACTIVE.get() is not None:
            raise DeferredError("a block is open already; use t.invoke(...) for several prompts in one forward")
        self.recorder.start_run()
        if self._prompt is not None:
            self.recorder.invoke = self.recorder.add_invoke(to_invoke(self._prompt, self._tokenize))
        self._token = ACTIVE.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ACTIVE.reset(self._token)
        if error is not None:
            self.recorder.open = False
            return
        self._run()

    def invoke(self, prompt: Any = None) -> Invoker:
        """One more prompt (or list of prompts) of the same forward; without one, the whole batch of the others."""
        if self._prompt is not None:
            raise BadArgument("this trace has its prompt already; open it without one to add invokes")
        return Invoker(self, prompt)

    @property
    def attention_mask(self) -> Any:
        """1 for tokens, 0 for padding, [rows, seq]: of the current invoke, or of the whole batch outside one."""
        return self.recorder.value(self.recorder.node("attention_mask"))

    def log(self, *values: Any) -> None:
        """Print values while the block runs: texts, numbers, deferred values."""
        self.recorder.node("log", [self.recorder.arg(value) for value in values])

    @property
    def job(self) -> TraceJob:
        """The submitted job, of a trace with `blocking=False`."""
        if self._job is None:
            raise NotSaved("there is a job only after a block with blocking=False")
        return TraceJob(self._job, self._fill)

    def _run(self) -> None:
        graph, tensors = self.recorder.finish()
        if not graph.nodes:
            return
        try:
            done = self._execute(graph, tensors, self._options)
        except InterposeError as error:
            if error.node is not None and error.node < len(graph.nodes):
                error.source = graph.nodes[error.node].source
            raise error from None
        if isinstance(done, Mapping):
            self._fill(done)
        else:
            self._job = done

    def _fill(self, values: Mapping[int, Any]) -> None:
        saved, self.recorder.saved = self.recorder.saved, []
        for node, value in saved:
            value._become(values[node])


class TraceJob:
    """A job whose values, once it has completed, appear in the names that were saved in its block."""

    def __init__(self, job: Handle, fill: Any) -> None:
        self._job, self._fill = job, fill

    def result(self, timeout: float | None = None) -> Mapping[int, Any]:
        """Wait for the end. Raises the job's error, or TimeoutError after `timeout` seconds."""
        values = self._job.result(timeout)
        self._fill(values)
        return values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)


class Invoker:
    """One prompt's part of a trace: what is read and written inside concerns its rows alone."""

    def __init__(self, tracer: Tracer, prompt: Any) -> None:
        self._tracer, self._prompt = tracer, prompt

    def __enter__(self) -> Invoker:
        recorder = self._tracer.recorder
        if recorder.invoke is not None:
            raise BadArgument("invokes don't nest; leave this one first")
        if self._prompt is not None:
            recorder.invoke = recorder.add_invoke(to_invoke(self._prompt, self._tracer._tokenize))
        elif not recorder.runs[-1].invokes:
            raise BadArgument("an invoke without a prompt sees the whole batch, and there is none yet")
        return self

    def __exit__(self, *error: object) -> None:
        self._tracer.recorder.invoke = None
