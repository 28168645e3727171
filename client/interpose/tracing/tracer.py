"""The blocks a user opens: `with model.trace(prompt) as t:`, in it `with t.invoke(prompt):`, sessions around."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol

from ..errors import BadArgument, DeferredError, InterposeError
from ..graph.manifest import Manifest
from ..graph.model import Invoke
from ..torch import RECORDER
from . import flow
from .cache import Cache, ModuleCache, collect, collect_modules
from .edits import Edit
from .execution import Execution, TraceJob
from .familiar import Backend, Once, padded, unknown
from .keeping import SavedDict, SavedList, advise
from .parameters import named, parameter
from .prompts import Tokenize, to_prompt
from .recorder import Recorder
from .steps import Iter, Steps


class Model(Protocol):
    """What handles and tracers need of a model."""

    _output_is_logits: bool
    """Whether the logits among several things it returns stand for all of its output."""
    _aliases: Mapping[str, Sequence[str]]
    """The user's own names of modules, and what they stand for."""

    def _tree(self) -> Manifest:
        """The manifest names are looked up in: the open block's, else any."""

    def _recording(self) -> Recorder:
        """The open block's recorder. Raises DeferredError outside one."""

    def _program(self, recorder: Recorder) -> Any:
        """What was recorded, as a program."""

    def _prepared(self, prompt: Any, inputs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        """A prompt and its further inputs, made ready by what belongs to the model."""


ACTIVE: ContextVar[Tracer | None] = ContextVar("interpose_tracer", default=None)
SESSION: ContextVar[Session | None] = ContextVar("interpose_session", default=None)


class Tracer:
    """One run of the model, a forward or a generation, with everything to be read and changed in it.

    Nothing runs until the block is left; then saved values become real. An error raised in the block runs nothing.

    Args:
        generation: the options of a generation, None for a single forward.
        owner: runs the graph when this block is left; None inside a session, which runs it.
        inputs: tensors beside the prompt, by name.
        adapter: the weights it runs with beside the model's own.
    """

    def __init__(
        self,
        model: Model,
        recorder: Recorder,
        prompt: Any,
        tokenize: Tokenize,
        *,
        generation: Mapping[str, Any] | None = None,
        owner: Execution | None = None,
        inputs: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> None:
        self.model = model
        self.recorder = recorder
        self._prompt = prompt
        self._inputs = inputs or {}
        self._tokenize = tokenize
        self._generation = generation
        self._owner = owner
        self._adapter = adapter
        self._last: list[Callable[[], None]] = []
        """What is recorded when the invoke, or the block, is left."""

    def __enter__(self) -> Tracer:
        if ACTIVE.get() is not None:
            raise DeferredError("a block is open already; use t.invoke(...) for several prompts in one forward")
        self.recorder.start_run(adapter=self._adapter)
        if self._generation is not None:
            self.recorder.generate(self._generation)
        if self._given:
            self.recorder.invoke = self._add(self._prompt, self._inputs)
        self._tokens = ACTIVE.set(self), RECORDER.set(self.recorder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        active, recorder = self._tokens
        advise(error)
        try:
            if error is None:
                self._record_last()
                self.recorder.gradients.check()
        except InterposeError:
            if self._owner is not None:
                self._owner.abandon()
            raise
        finally:
            ACTIVE.reset(active)
            RECORDER.reset(recorder)
            self.recorder.invoke = None
        if error is None and self.recorder.runs[-1].options.get("stream"):
            self.recorder.keep_tokens()
        if self._owner is None:
            return
        if error is not None:
            self._owner.abandon()
        else:
            self._owner.run()

    def __getattr__(self, name: str) -> Any:
        unknown("a block", name)

    def _record_last(self) -> None:
        last, self._last = self._last, []
        for record in last:
            record()

    # -- prompts and steps -------------------------------------------------------------------------------------

    def invoke(self, prompt: Any = None, **inputs: Any) -> Invoker:
        """One more prompt (or list of prompts) of the same run; without one, the whole batch of the others."""
        if self._given:
            raise BadArgument("this trace has its prompt already; open it without one to add invokes")
        return Invoker(self, prompt, inputs)

    @property
    def _given(self) -> bool:
        return self._prompt is not None or bool(self._inputs)

    def _add(self, prompt: Any, inputs: Mapping[str, Any]) -> int:
        if isinstance(prompt, Invoke):
            return self.recorder.add_invoke(prompt)
        prompt, inputs = self.model._prepared(prompt, inputs)
        return self.recorder.add_prompt(to_prompt(prompt, self._tokenize, self.recorder.manifest, inputs))

    @property
    def attention_mask(self) -> Any:
        """1 for tokens, 0 for padding, [rows, seq]: of the current invoke, or of the whole batch outside one."""
        return self.recorder.value(self.recorder.node("attention_mask"))

    @property
    def alive(self) -> Any:
        """Which rows' texts go on at this step of a generation, [rows], bool: those that had not ended before it.

        What is read at a step of rows that have ended is no value: nan in floating-point numbers and in what is
        computed from them, the smallest number of their dtype in saved integers. Where all rows that a value comes
        from have ended, it never comes (None in a list of steps).
        """
        step = 0 if self.recorder.in_steps() else self.recorder.step
        return self.recorder.value(self.recorder.node("alive", (step,)))

    @property
    def iter(self) -> Iter:
        """Steps of a generation: `for step in t.iter[:3]:`, `with t.iter[2]:`."""
        return Iter(self.recorder)

    def all(self) -> Steps:
        """Every step of a generation: `with t.all():` records its body once."""
        return self.iter[:]

    def next(self, count: int = 1) -> Tracer:
        """The lines that follow concern the next step of the generation."""
        self.recorder.step = self.iter.later(self.recorder.step, count)
        return self

    def barrier(self, count: int = 0) -> Callable[[], None]:
        """What does nothing when called: values flow between invokes without waiting for one another."""
        return lambda: None

    @property
    def result(self) -> Any:
        """All token ids of a generation, [rows, prompt and new tokens]; save it to have them after the block.

        Of a single forward: the model's output.
        """
        if self.recorder.runs[-1].kind != "generate":
            return self.model.output  # type: ignore[attr-defined]
        return self.recorder.value(self.recorder.node("tokens", invoke=None, when=None))

    # -- control -----------------------------------------------------------------------------------------------

    def cond(
        self, pred: Any, then: Callable[[], Any] | None = None, otherwise: Callable[[], Any] | None = None
    ) -> Any:
        """Run one of two functions' bodies where the model runs, as one deferred value decides.

        Both are recorded; each may read and write hook points that come after the condition is known. Without
        functions it is a block: `with t.cond(pred):`, perhaps followed by `with t.cond(~pred):`.

        Returns:
            What the chosen one returned: None, a value, or several, alike in both.
        """
        if then is None:
            return flow.branch(self.recorder, pred)
        return flow.cond(self.recorder, pred, then, otherwise)

    def loop(self, count: int, body: Callable[..., Any], *init: Any) -> Any:
        """Repeat `body(turn, *carried) -> carried` for `count` turns; returns what is carried at the end."""
        return flow.loop(self.recorder, count, body, init)

    def while_loop(self, proceed: Callable[..., Any], body: Callable[..., Any], *init: Any, most: int) -> Any:
        """Repeat `body(turn, *carried)` while `proceed(*carried)`, for `most` turns at most."""
        return flow.loop(self.recorder, most, body, init, proceed=proceed)

    def scan(self, count: int, body: Callable[..., Any], *init: Any) -> Any:
        """A loop whose `body(turn, *carried)` gives a pair; the second parts come back stacked, [turns, ...]."""
        return flow.loop(self.recorder, count, body, init, stacked=True)

    def stop(self) -> None:
        """Nothing later in the forward is needed: asking for it raises. The stopping itself is automatic."""
        self._record_last()
        self.recorder.stopped = True

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function here: what it does with deferred values is recorded. `print` is `log`."""
        return self.log(*args) if function is print else function(*args, **kwargs)

    # -- keeping -----------------------------------------------------------------------------------------------

    def log(self, *values: Any) -> None:
        """Print values while the block runs: texts, numbers, deferred values."""
        self.recorder.node("tell", [self.recorder.arg(value) for value in values])

    def name(self, name: str, value: Any) -> Any:
        """Save a value under a name, by which a program (`t.graph`) gives it back; returns what `save` does."""
        return named(self.recorder, name, value)

    def param(self, name: str, default: Any) -> Any:
        """A number or tensor that may be another when the block's program is run again: `program.run(name=...)`."""
        return parameter(self.recorder, name, default)

    def list(self, *values: Any) -> SavedList:
        """A list whose members are saved: `kept = t.list()`, then `kept.append(value)`."""
        return SavedList(values)

    def dict(self, **values: Any) -> SavedDict:
        """A dict whose values are saved: `kept = t.dict()`, then `kept[name] = value`."""
        return SavedDict(values)

    def cache(
        self,
        *patterns: Any,
        modules: Sequence[Any] | None = None,
        include_output: bool = True,
        include_inputs: bool = False,
        dtype: Any = None,
        device: Any = None,
        detach: bool = True,
    ) -> Cache | ModuleCache:
        """Save every hook point that matches: `t.cache("transformer.h.*.output", model.lm_head)`.

        Patterns are of the form `module.point`, with `*` for any one part; a module stands for its output. The
        values are those of this line.

        Without patterns, whole modules: `modules`, or all of them. Their values are those at the end of the block
        or invoke, with what is written after this line: `cache["model.transformer.h.0"].output`, or
        `cache.model.transformer.h[0].output`.

        Args:
            include_output, include_inputs: which of a module's values to keep.
            dtype: what to turn single tensors into.
            device, detach: saved values arrive in this process's memory, and detached, whatever is asked for.
        """
        if patterns:
            if modules is not None:
                raise BadArgument("a cache is of patterns or of modules=[...]")
            return collect(self.model, patterns)
        cache, fill = collect_modules(
            self.model, modules, outputs=include_output, inputs=include_inputs, dtype=dtype
        )
        if self.recorder.when is not None:
            fill()  # the end of the block lies outside this body
        else:
            self._last.append(fill)
        return cache

    @property
    def graph(self) -> Any:
        """What the block recorded (so far), as a `Program` to print, save, load and run again."""
        return self.model._program(self.recorder)

    @property
    def job(self) -> TraceJob:
        """The submitted job, of a block with `blocking=False`."""
        if self._owner is None:
            raise DeferredError("the job belongs to the session around this block")
        return self._owner.job

    @property
    def backend(self) -> Backend:
        """The job as nnsight names it: `job_id`, `job_status`, and called, the values or None."""
        return Backend(self)


class Invoker:
    """One prompt's part of a run: what is read and written inside concerns its rows alone."""

    def __init__(self, tracer: Tracer, prompt: Any, inputs: Mapping[str, Any]) -> None:
        self._tracer, self._prompt, self._inputs = tracer, prompt, inputs
        self._given: Invoke | None = None

    @property
    def inputs(self) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
        """The prompt as the model is given it, as nnsight has it: `invoker.inputs[0][0]["input_ids"][0]`."""
        return ((padded(self._given.rows) if self._given is not None else {},), {})

    def __enter__(self) -> Invoker:
        recorder = self._tracer.recorder
        if recorder.invoke is not None:
            raise BadArgument("invokes don't nest; leave this one first")
        if self._prompt is not None or self._inputs:
            recorder.invoke = self._tracer._add(self._prompt, self._inputs)
            self._given = recorder.runs[-1].invokes[recorder.invoke]
        elif not recorder.runs[-1].invokes:
            raise BadArgument("an invoke without a prompt sees the whole batch, and there is none yet")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._tracer._record_last()
        finally:
            self._tracer.recorder.invoke = None


class Session:
    """Several runs as one job: values flow between them without leaving the server.

    Runs that need nothing of one another share forwards.

    Args:
        begin: makes what runs them, once it is needed: it may load the model.
        adapter: of its blocks that choose none.
    """

    def __init__(
        self,
        begin: Callable[[], Execution],
        model: Model,
        edits: Sequence[Edit],
        *,
        remote: bool = False,
        adapter: str | None = None,
    ) -> None:
        self.model = model
        self.edits = edits
        self.remote = remote
        self.adapter = adapter
        self._begin = begin
        self._token: Token[Session | None] | None = None

    @cached_property
    def _owner(self) -> Execution:
        return self._begin()

    @property
    def recorder(self) -> Recorder:
        return self._owner.recorder

    def __enter__(self) -> Session:
        if SESSION.get() is not None or ACTIVE.get() is not None:
            raise DeferredError("a block is open already; a session holds traces, not other sessions")
        self._token = SESSION.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            SESSION.reset(self._token)
        advise(error)
        if "_owner" not in vars(self):
            return  # nothing was asked for
        if error is not None:
            self._owner.abandon()
        else:
            self._owner.run()

    list = Tracer.list
    dict = Tracer.dict
    log = Tracer.log
    apply = Tracer.apply
    graph = Tracer.graph

    def iter(self, items: Iterable[Any]) -> Once:
        """The items, for a Python loop over them."""
        return Once(items)

    def __getattr__(self, name: str) -> Any:
        unknown("a session", name)

    @property
    def job(self) -> TraceJob:
        """The submitted job, of a session with `blocking=False`."""
        return self._owner.job
