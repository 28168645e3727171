"""Models as the user holds them: `LanguageModel("org/name")`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from .access import ModelAccess
from .errors import BadArgument, UnknownAdapter
from .familiar import Familiar, other_options
from .graph.adapters import AdapterInfo, check_adapter
from .graph.generation import OPTIONS
from .graph.inputs import TOKENS
from .graph.manifest import Manifest
from .traced import Traced
from .tracing.edits import Editor
from .tracing.execution import Execution, Options
from .tracing.handles import aliases
from .tracing.recorder import Recorder
from .tracing.source import caller
from .tracing.tracer import ACTIVE, SESSION, Session, Tracer

if TYPE_CHECKING:
    from .live import NewText

Batching = Literal["auto", "exclusive"]


class LanguageModel(Familiar, Traced):
    """A language model, on a server or in this process.

    Building one loads nothing: a remote trace needs the server's manifest alone, a local one loads the weights when
    it first runs.

    Args:
        source: the name a server serves it under, a hub id, a local folder, or a loaded `torch.nn.Module`.
        host, api_key: the server; by default `CONFIG`'s.
        device_map, device: where a local model goes: "cpu", "cuda", "auto".
        dtype: of a local model's weights, as its files say by default; `torch_dtype` is the same.
        revision: of a hub model.
        tokenizer: for a loaded module: its tokenizer.
        rename: further names of modules: `{"transformer.h": "blocks", "mlp": "feedforward"}`.
        adapters: of a local model: LoRA weights that a block may choose, as `{"name": folder or hub id}`.
        others: what other libraries take here; what means something else here is refused with a word.
    """

    def __init__(
        self,
        source: Any,
        *,
        host: str | None = None,
        api_key: str | None = None,
        device_map: str | None = None,
        device: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        revision: str | None = None,
        tokenizer: Any = None,
        rename: Mapping[str, str | Sequence[str]] | None = None,
        adapters: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        other_options(others)
        chosen = dtype if dtype is not None else torch_dtype
        load = {
            "device": device or device_map,
            "dtype": None if chosen is None else str(chosen).removeprefix("torch."),
            "revision": revision,
        }
        self._set_up(ModelAccess(source, host, api_key, load, tokenizer, adapters), ())
        self.__dict__["_aliases"] = aliases(rename or {})

    # -- blocks ------------------------------------------------------------------------------------------------

    def trace(
        self,
        prompt: Any = None,
        *,
        remote: bool = False,
        blocking: bool = True,
        timeout: float | None = None,
        batching: Batching = "auto",
        adapter: str | None = None,
        trace: bool = True,
        scan: bool = True,
        validate: bool = True,
        **inputs: Any,
    ) -> Any:
        """Open a block whose reads and writes happen inside one forward of the model.

        Args:
            prompt: a text, token ids, or a list of either; what a tokenizer or processor returns; None to give
                prompts with `t.invoke(...)`.
            inputs: tensors that the model takes beside token ids, or in their place: `pixel_values=...`.
            remote: run on the server.
            blocking: False to go on while it runs; the tracer's `job` then has `status`, `result()`, `cancel()`.
            timeout: seconds it may run on the server, from when a worker begins with it.
            batching: "exclusive" to share the forward with nobody, for results bitwise those of a plain forward.
            adapter: LoRA weights to run with beside the model's own, one of `model.adapters`.
            trace: False for the model's output right away, without a block.
            scan, validate: a block is always checked as it is recorded, whatever they say.
        """
        _check_misspelt(inputs)
        block = self._open(prompt, Options(remote, blocking, timeout, batching), adapter, inputs=inputs)
        return block if trace else self._result_of(block)

    def generate(
        self,
        prompt: Any = None,
        *,
        remote: bool = False,
        blocking: bool = True,
        timeout: float | None = None,
        batching: Batching = "auto",
        adapter: str | None = None,
        stream: Callable[[NewText], None] | bool = False,
        trace: bool = True,
        **options: Any,
    ) -> Any:
        """Open a block around a generation; `t.iter`, `t.all()` choose steps, `t.result` is all token ids.

        Inside an open block it makes that block's run a generation instead, and returns the saved token ids.

        Args:
            remote, blocking, timeout, batching, adapter: as of a trace.
            stream: a function that is given each new token as it comes, a `NewText`; or True, to find them among
                the events of the job of a block with `blocking=False`.
            trace: False for all token ids right away, without a block.
            options: as of the transformers library: max_new_tokens (20 if not given), do_sample, temperature,
                top_k, top_p, repetition_penalty, eos_token_id, stop_strings, ...; and `seed`. Tensors that the
                model takes beside token ids go by their names here too.
        """
        tracer = ACTIVE.get()
        if tracer is not None and self._is(tracer.model):
            if prompt is not None:
                raise BadArgument("the block has its prompt already: generate(max_new_tokens=...) continues it")
            if stream:
                raise BadArgument("tokens stream from a block of their own: with model.generate(..., stream=...)")
            if adapter is not None:
                raise BadArgument("the block has chosen its adapter already: with model.trace(..., adapter=...)")
            if not isinstance(tracer, Tracer):
                raise BadArgument("an edit generates nothing: generate with the edited model")
            tracer.recorder.generate(options)
            return tracer.result.save()
        inputs = self._taken(options, remote)
        if not stream:
            how = Options(remote, blocking, timeout, batching)
            block = self._open(prompt, how, adapter, generation=options, inputs=inputs)
            return block if trace else self._result_of(block)
        told = stream if callable(stream) else None
        if told is not None and (not blocking or SESSION.get() is not None):
            raise BadArgument(
                "a function is told of tokens only where this line waits for them; with blocking=False write "
                "stream=True and async for event in t.job"
            )
        how = Options(remote, blocking, timeout, batching, told)
        return self._open(prompt, how, adapter, generation={**options, "stream": True}, inputs=inputs)

    def _taken(self, options: dict[str, Any], remote: bool) -> dict[str, Any]:
        """The model's inputs among options, taken out of these."""
        names = options.keys() - OPTIONS.keys()
        inputs = {*TOKENS, *self._further, *self._access.manifest(remote).inputs} if names else set()
        return {name: options.pop(name) for name in names & inputs}

    @property
    def _further(self) -> frozenset[str]:
        """Names of inputs that are made into the model's own."""
        return frozenset()

    def session(
        self,
        *,
        remote: bool = False,
        blocking: bool = True,
        timeout: float | None = None,
        batching: Batching = "auto",
        adapter: str | None = None,
    ) -> Session:
        """Open a block for several traces that run as one job; values of one can be used in the next.

        Args:
            adapter: of those of its traces that choose none; others as of a trace.
        """
        begin = partial(self._execution, Options(remote, blocking, timeout, batching))
        chosen = self._adapter if adapter is None else self._chosen(adapter, self._access.manifest(remote))
        return Session(begin, self, self._edits, remote=remote, adapter=chosen)

    def scan(self, prompt: Any = None, *, adapter: str | None = None, **inputs: Any) -> Tracer:
        """Open a block that runs nothing: shapes, order and errors are told as in a trace."""
        how = Options(remote=self._access.prefers_server)
        return self._open(prompt, how, adapter, execute=None, inputs=inputs)

    def edit(self, *, inplace: bool = False, adapter: str | None = None) -> Editor:
        """Open a block whose interventions stay: they come first in every later block of the edited model.

        `with model.edit() as edited:` leaves `model` as it was; with `inplace` it is `model` that is edited.

        Args:
            adapter: that of the edited model's blocks that choose none.
        """
        editor = super().edit(inplace=inplace)
        if adapter is not None:
            editor.model.__dict__["_adapter"] = self._chosen(adapter, editor.recorder.manifest)
        return editor

    # -- adapters ----------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """The LoRA weights that a block may choose, by name: `model.trace(prompt, adapter="name")`."""
        return self.manifest.adapters

    def load_adapter(self, source: Any, adapter_name: str) -> None:
        """Load LoRA weights, from a folder or the hub, that blocks of a local model may choose from now on.

        Raises:
            ConfigError: they aren't LoRA weights, or aren't of this model.
            BadArgument: the model isn't loaded here: a server's adapters are its operator's choice.
        """
        if self._access.prefers_server:
            raise BadArgument(
                "a server's adapters are chosen by who runs it (interpose serve MODEL --adapter NAME=FOLDER); "
                f"{self._access.name} has {', '.join(sorted(self.adapters)) or 'none'} there"
            )
        self._access.load_adapter(adapter_name, source)

    def _chosen(self, adapter: str | None, manifest: Manifest) -> str | None:
        """The adapter of a block that chose one, or none. Raises UnknownAdapter at the user's line."""
        name = self._adapter if adapter is None else adapter
        try:
            check_adapter(name, manifest)
        except UnknownAdapter as error:
            error.source = caller()
            raise error from None
        return name

    # -- what it is --------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; needs neither a hub nor the transformers library."""
        return self._access.tokenizer(self._access.prefers_server)

    @property
    def manifest(self) -> Manifest:
        """Everything known of the model: modules, order, layouts, parameters."""
        return self._tree()

    @property
    def generator(self) -> Generator:
        """`model.generator.output` inside a generation: all its token ids."""
        return Generator(self)

    @property
    def _model(self) -> Any:
        """The underlying torch module of a local model; of one on a server, its tree to print."""
        return self if self._access.prefers_server else self._access.local.loaded.model

    # -- parts -------------------------------------------------------------------------------------------------

    def _execution(self, options: Options) -> Execution:
        remote = options.remote
        manifest = self._access.manifest(remote)
        recorder = Recorder(manifest, self._access.face(remote), edits=self._edits)
        return Execution(recorder, self._access.execute, replace(options, revision=manifest.revision))

    def _open(self, prompt: Any, options: Options, adapter: str | None = None, **rest: Any) -> Tracer:
        session = SESSION.get()
        how = {"generation": rest.get("generation"), "inputs": rest.get("inputs")}
        if session is not None:
            self._check_joins(session, options)
            tokenize = partial(self._tokenize, session.remote)
            recorder = self._joined(session)
            how["adapter"] = session.adapter if adapter is None else self._chosen(adapter, recorder.manifest)
            return Tracer(self, recorder, prompt, tokenize, **how)
        owner = self._execution(options)
        how["adapter"] = self._chosen(adapter, owner.recorder.manifest)
        if "execute" in rest:
            owner.execute = rest["execute"]
        tokenize = partial(self._tokenize, options.remote)
        return Tracer(self, owner.recorder, prompt, tokenize, owner=owner, **how)

    @staticmethod
    def _result_of(block: Tracer) -> Any:
        with block:
            return block.result.save()

    def __iter__(self) -> Iterator[Any]:
        editor: Any = ACTIVE.get()
        if editor is not None and editor.model is self and not isinstance(editor, Tracer):
            return iter((editor, self))  # with model.edit() as (tracer, edited):
        return super().__iter__()

    def _tokenize(self, remote: bool, text: str) -> list[int]:
        ids: list[int] = self._access.tokenizer(remote).encode(text)
        return ids

    def _edit_recorder(self) -> Recorder:
        remote = self._access.prefers_server
        return Recorder(self._access.manifest(remote), self._access.face(remote), symbolic=True)

    def _tree(self) -> Manifest:
        tracer = ACTIVE.get()
        if tracer is not None and self._is(tracer.model):
            open_: Manifest = tracer.recorder.manifest
            return open_
        access: ModelAccess = self._access
        return access.manifest(access.prefers_server)


_OPTIONS = ("remote", "blocking", "timeout", "batching", "adapter", "trace", "scan", "validate")


def _check_misspelt(inputs: Mapping[str, Any]) -> None:
    """Raises BadArgument for an input that is no tensor, under a name much like that of an option."""
    for name, value in inputs.items():
        close = difflib.get_close_matches(name, _OPTIONS, 1, 0.7)
        if close and not hasattr(value, "shape"):
            raise BadArgument(f"a trace takes no {name!r}; did you mean {close[0]}?")


class Generator:
    """What notebooks call the generating part of a model."""

    def __init__(self, model: LanguageModel) -> None:
        self._owner = model

    @property
    def output(self) -> Any:
        """All token ids, [rows, prompt and new tokens]."""
        recorder = self._owner._recording()
        return recorder.value(recorder.node("tokens", invoke=None, when=None))
