"""What happens when the outermost block is left: the graph runs, and saved names get their values."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from ..errors import InterposeError, NotSaved
from ..graph.adapters import revision_of
from ..graph.model import Graph
from .recorder import Recorder


@dataclass(frozen=True)
class Options:
    """How a block is run.

    Attributes:
        timeout: seconds, None for the configured one.
        on_tokens: told of each new token of a generation, as a `NewText`.
        revision: of the manifest the graph is recorded against; with the adapters it uses, once it is run.
    """

    remote: bool = False
    blocking: bool = True
    timeout: float | None = None
    batching: Literal["auto", "exclusive"] = "auto"
    on_tokens: Callable[[Any], None] | None = None
    revision: str | None = None


class Handle(Protocol):
    """A submitted job."""

    @property
    def id(self) -> str: ...

    @property
    def status(self) -> Any: ...

    def result(self, timeout: float | None = None) -> Mapping[int, Any]: ...

    def cancel(self) -> Any: ...

    def __aiter__(self) -> AsyncIterator[Any]: ...

    def __await__(self) -> Generator[Any, None, Mapping[int, Any]]: ...


class Execute(Protocol):
    """Runs a graph; with `blocking` gives the saved values by node, else the job that will have them."""

    def __call__(
        self, graph: Graph, tensors: Mapping[str, Any], options: Options
    ) -> Mapping[int, Any] | Handle: ...


class Execution:
    """One recorded graph and how it is run. `execute` None: it isn't."""

    def __init__(self, recorder: Recorder, execute: Execute | None, options: Options) -> None:
        self.recorder = recorder
        self.execute = execute
        self.options = options
        self._job: Handle | None = None

    def run(self) -> None:
        """Run the graph, unless nobody asked for anything. Errors name the user's line."""
        graph, tensors = self.recorder.finish()
        if self.execute is None or not graph.nodes:
            self._lose("nothing was run: a scan tells shapes, a trace gives values")
            return
        options = self.options
        if options.revision is not None:
            options = replace(options, revision=revision_of(graph.runs, self.recorder.manifest))
        try:
            done = self.execute(graph, tensors, options)
        except InterposeError as error:
            if error.node is not None and error.node < len(graph.nodes):
                error.source = graph.nodes[error.node].source
            self._lose("this value never came: running its block failed")
            raise error from None
        if isinstance(done, Mapping):
            self.fill(done)
        else:
            self._job = done

    def abandon(self) -> None:
        """The block failed: nothing runs."""
        self.recorder.open = False
        self._lose("this value never came: its block ended in an error, so nothing was run")

    def _lose(self, reason: str) -> None:
        saved, self.recorder.saved = self.recorder.saved, []
        for _, value in saved:
            value._absent = reason

    @property
    def job(self) -> TraceJob:
        if self._job is None:
            raise NotSaved("there is a job only after a block with blocking=False")
        return TraceJob(self._job, self)

    def fill(self, values: Mapping[int, Any]) -> None:
        """Turn what was saved into its values; what never came says why when it is used."""
        recorder = self.recorder
        saved, recorder.saved = recorder.saved, []
        for node, value in saved:
            if node in values:
                value._become(values[node])
            else:
                value._absent = "this value never came: its step or branch wasn't reached, or its prompts had ended"
        totals: dict[int, Any] = {}  # of several backwards, as torch adds them up
        for node, value in recorder.gradients.saved:
            if node in values:
                totals[id(value)] = values[node] + totals.get(id(value), 0)
                value._keep_gradient(totals[id(value)])
        recorder.gradients.saved = []


class TraceJob:
    """A job whose values, once it has completed, appear in the names that were saved in its block."""

    def __init__(self, job: Handle, execution: Execution) -> None:
        self._job, self._execution = job, execution

    def result(self, timeout: float | None = None) -> Mapping[int, Any]:
        """Wait for the end. Raises the job's error, or TimeoutError after `timeout` seconds."""
        values = self._job.result(timeout)
        self._execution.fill(values)
        return values

    def __await__(self) -> Generator[Any, None, Mapping[int, Any]]:
        """As `result`, in the caller's own event loop."""
        values = yield from self._job.__await__()
        self._execution.fill(values)
        return values

    def __repr__(self) -> str:
        return repr(self._job)

    def __aiter__(self) -> AsyncIterator[Any]:
        """Everything that happens to it, from the beginning on; of a generation with `stream`, each new token."""
        events: AsyncIterator[Any] = self._job.__aiter__()
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)
