"""Any torch module as a model: `Model(net)`, in this process."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from .errors import BadArgument, ConfigError
from .graph.manifest import Manifest
from .graph.model import Graph
from .traced import Traced
from .tracing.execution import Execution, Options
from .tracing.modules import GivenInvoke, ModuleRecorder, ModuleTracer
from .tracing.tracer import ACTIVE, SESSION, Session

if TYPE_CHECKING:
    from .runtime.wrapped import Measurement
    from .transports.local import LocalModule


class Model(Traced):
    """Any `torch.nn.Module`, with hook points at every module within it and at the functions their forwards call.

    The module runs in this process and stays as it is: its mode, parameters and random state are its owner's. What
    it does is measured by running it once on each new kind of inputs.

    Args:
        module: the module; of a language model take `LanguageModel`, which knows what its tokens mean.
        name: what `print` calls it; its class's name by default.
        rows: the dimension of its inputs that counts rows, where several prompts share a forward.
    """

    _output_is_logits = False
    _runs_programs = False

    def __init__(self, module: Any, *, name: str | None = None, rows: int = 0) -> None:
        if importlib.util.find_spec("torch") is None:
            raise ConfigError('a module in this process needs torch: pip install "interpose[local]"')
        from .transports.local import LocalModule

        self._set_up(LocalModule(module, name or type(module).__name__, rows), ())

    def trace(self, *args: Any, **kwargs: Any) -> ModuleTracer:
        """Open a block whose reads and writes happen inside one forward of the module.

        Args:
            args, kwargs: what the module's forward is called with; nothing, to give inputs with `t.invoke(...)`.
        """
        return self._open(args, kwargs)

    def scan(self, *args: Any, **kwargs: Any) -> ModuleTracer:
        """Open a block that runs nothing of it: shapes, order and errors are told as in a trace."""
        return self._open(args, kwargs, run=False)

    def session(self) -> Session:
        """Open a block for several traces that run as one job; values of one can be used in the next."""
        return Session(self._execution, self, self._edits)

    @property
    def manifest(self) -> Manifest:
        """What is known of the module: in a block on that block's inputs, else on those it last ran on."""
        return self._tree()

    @property
    def _model(self) -> Any:
        return self._local.wrapped.module

    # -- parts -------------------------------------------------------------------------------------------------

    @property
    def _local(self) -> LocalModule:
        access: LocalModule = self._access
        return access

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, run: bool = True) -> ModuleTracer:
        if "remote" in kwargs and "remote" not in self._parameters() and kwargs.pop("remote"):
            raise ConfigError("a module of this process is on no server; LanguageModel names one that is")
        given = args or kwargs or not self._parameters()
        prompt = GivenInvoke(given=(args, kwargs)) if given else None
        session = SESSION.get()
        if session is not None:
            return ModuleTracer(self, self._joined(session), prompt, _no_text)
        owner = self._execution(run=run)
        return ModuleTracer(self, owner.recorder, prompt, _no_text, owner=owner)

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self._model.forward).parameters

    def _execution(self, *, run: bool = True) -> Execution:
        recorder = ModuleRecorder(self._local, _face(), self._edits)
        return Execution(recorder, partial(self._execute, recorder) if run else None, Options())

    def _execute(
        self, recorder: ModuleRecorder, graph: Graph, tensors: Mapping[str, Any], options: Options
    ) -> Mapping[int, Any]:
        measured = [cast("Measurement", run.measured) or self._local.tree() for run in recorder.ran]
        return self._local.run(graph, tensors, [run.given for run in recorder.ran], measured)

    def _edit_recorder(self) -> ModuleRecorder:
        if self._local.last is None:
            raise BadArgument(
                "a module's points are known once it has run: with model.scan(x): pass, then model.edit()"
            )
        return ModuleRecorder(self._local, _face(), measured=self._local.last.manifest)

    def _tree(self) -> Manifest:
        tracer = ACTIVE.get()
        if tracer is not None and self._is(tracer.model):
            return tracer.recorder.manifest
        return (self._local.last or self._local.tree()).manifest

    def _recording(self) -> ModuleRecorder:
        recorder = super()._recording()
        assert isinstance(recorder, ModuleRecorder)
        if not recorder.ready:
            raise BadArgument("the block has no inputs yet: give them to trace(x), or with t.invoke(x):")
        return recorder


def _face() -> Any:
    from .tracing.torch_face import make

    return make


def _no_text(text: str) -> list[int]:
    raise BadArgument("this model takes the inputs of its module, not text")
