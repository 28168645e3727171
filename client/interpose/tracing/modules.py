"""Blocks around a module that takes inputs of its own, where a language model takes token rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol, TypeAlias

from ..errors import BadArgument
from ..graph.manifest import UNKNOWN, Layout, Leaf, Manifest
from ..graph.model import Invoke, RunKind
from .bases import MakeValue
from .edits import Edit
from .recorder import Recorder
from .tracer import Invoker, Tracer

Given: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional arguments of a forward, and those by keyword."""


class Measured(Protocol):
    """A module on one kind of inputs."""

    @property
    def manifest(self) -> Manifest: ...


class Measure(Protocol):
    """Finds out what a module does on some inputs."""

    def tree(self) -> Measured: ...

    def measure(self, given: Given, *, shared: bool) -> Measured: ...

    def count(self, given: Given) -> int: ...


@dataclass(frozen=True, eq=False)
class GivenInvoke(Invoke):
    """Inputs as the module's forward takes them. `shared`: more may come that share the forward, by rows."""

    given: Given = ((), {})
    shared: bool = False


@dataclass
class Ran:
    """One run of a module: its prompts' inputs, and what was measured on them."""

    given: list[Given] = field(default_factory=list)
    measured: Measured | None = None


class ModuleRecorder(Recorder):
    """Records runs of a module; each run's points are those it has on that run's inputs.

    Args:
        measured: what holds where there are no inputs, as in an edit.

    Attributes:
        ran: of every run so far.
    """

    def __init__(
        self,
        module: Measure,
        make: MakeValue,
        edits: Sequence[Edit] = (),
        *,
        measured: Manifest | None = None,
    ) -> None:
        self._module = module
        self._fixed = None if measured is None else loosened(measured)
        self._tree = self._fixed or module.tree().manifest
        self.ran: list[Ran] = []
        super().__init__(self._tree, make, edits, symbolic=measured is not None)

    @property
    def ready(self) -> bool:
        """Whether the current run's points are known."""
        return self._fixed is not None or self.ran[-1].measured is not None

    def start_run(self, kind: RunKind = "trace", adapter: str | None = None) -> None:
        self.ran.append(Ran())
        self.manifest = self._tree
        super().start_run(kind, adapter)

    def add_invoke(self, invoke: Invoke) -> int:
        assert isinstance(invoke, GivenInvoke)
        run = self.ran[-1]
        measured = self._module.measure(invoke.given, shared=invoke.shared)
        if run.measured is not None and measured.manifest.modules != run.measured.manifest.modules:
            raise BadArgument(
                "prompts that share a forward differ only in their number of rows; trace these in a session"
            )
        run.given.append(invoke.given)
        run.measured, self.manifest = measured, measured.manifest
        rows = self._module.count(invoke.given) if invoke.shared else 1
        return super().add_invoke(Invoke(((),) * rows))

    def node(self, op: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **rest: Any) -> int:
        measured = self.ran[rest.get("run", -1)].measured if self.ran else None
        self._checker.manifest = self._tree if measured is None else measured.manifest
        return super().node(op, args, kwargs, **rest)


def loosened(manifest: Manifest) -> Manifest:
    """The same for inputs of any sizes."""
    modules = {
        path: replace(info, points={name: _loose(layout) for name, layout in info.points.items()})
        for path, info in manifest.modules.items()
    }
    return replace(manifest, modules=modules)


def _loose(layout: Layout) -> Layout:
    if isinstance(layout, Leaf):
        return Leaf((UNKNOWN,) * len(layout.dims), layout.dtype)
    if isinstance(layout, tuple):
        return tuple(map(_loose, layout))
    if isinstance(layout, dict):
        return {name: _loose(item) for name, item in layout.items()}
    return None


class ModuleTracer(Tracer):
    """One forward of a module, with everything to be read and changed in it."""

    def invoke(self, *args: Any, **kwargs: Any) -> Invoker:
        """Inputs of one more prompt of the same forward; without any, all rows of the others.

        Every tensor of them has rows in the same dimension, the first unless the model was told another.
        """
        given = args or kwargs
        return super().invoke(GivenInvoke(given=(args, kwargs), shared=True) if given else None)

    @property
    def attention_mask(self) -> NoReturn:
        raise BadArgument("this model takes no tokens, so no padding is masked")
