"""Any torch module of this process: measured on the inputs it is to run on, then run with a graph's interventions.

Nothing is known of what such inputs mean, so a point's sizes are those it has for these very inputs. Where several
prompts share a forward, each of their tensors has rows in one dimension; then what belongs to rows is measured on
different numbers of them.

The module stays as its owner has it: in its mode, with its parameters, gradients, buffers and random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import BadArgument, InterposeError, OpFailed, OutOfMemory, first_line
from ..graph.limits import UNLIMITED
from ..graph.manifest import BATCH, UNKNOWN, Leaf, Manifest, leaves, walk
from ..graph.model import Graph, Node
from ..graph.validate import Checker, Known
from . import given, nests
from .describe import versions
from .forward import Forward, place
from .given import Given
from .independence import TOLERANCE
from .inputs import Feeding, device_of
from .interpreter import Interpreter
from .layouts import Size, weights_dtype
from .loading import Loaded
from .plan import compile_graph
from .probe import Watch, described_bare
from .rehearsal import rehearsal
from .rows import Span
from .sink import Sink
from .world import World

MOST_KEPT = 64
"""Kinds of inputs whose measurements are kept."""

Inputs: TypeAlias = Sequence[Sequence[Given]]
"""For each run, the inputs of its prompts."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """A module on one kind of inputs. `rewritten` as of `Loaded`."""

    manifest: Manifest
    rewritten: frozenset[tuple[str, str]] = frozenset()


class Wrapped:
    """A module and what was measured on it. Not reentrant: one call at a time.

    Args:
        rows: the dimension of its inputs that counts rows, where several prompts share a forward.

    Raises:
        BadArgument: it isn't a torch module, or a compiled one.
    """

    def __init__(self, module: nn.Module, name: str, rows: int = 0) -> None:
        if not isinstance(module, nn.Module):
            raise BadArgument(f"a model is a torch.nn.Module, not a {type(module).__name__}")
        if any(map(_compiled, module.modules())):
            raise BadArgument("a compiled module shows nothing of its inside: give the one it was compiled from")
        self.module, self.name, self.rows = module, name, rows
        self._kept: dict[Any, Measurement] = {}
        self._state: Any = None

    def tree(self) -> Measurement:
        """What is known without running it: the modules and their parameters."""
        return Measurement(self._manifest(described_bare(self._modules())))

    @torch.no_grad()
    def measure(self, inputs: Given, *, shared: bool) -> Measurement:
        """Run it on some inputs, and on other numbers of rows of them if prompts are to share its forward.

        Raises:
            BadArgument: its forward fails on them, or its rows can't be told apart.
        """
        given.check(inputs)
        modules = tuple((path, module, module.training) for path, module in self._modules().items())
        state = modules, _surroundings()
        if state != self._state:
            self._state = state
            self._kept.clear()
        key = given.signature(inputs, self.rows if shared else None)
        found = self._kept.get(key) if key is not None else None
        if found is None:
            with rehearsal(self.module):
                found = self._by_rows(inputs) if shared else self._as_it_is(inputs)
            if key is not None:
                if len(self._kept) >= MOST_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = found
        return found

    def run(
        self,
        graph: Graph,
        inputs: Inputs,
        measured: Sequence[Measurement],
        attachments: Mapping[str, Tensor],
        sink: Sink,
    ) -> None:
        """Run a graph. Raises the error that ended it."""
        try:
            learns = any(node.op == "backward" for node in graph.nodes)
            with torch.no_grad(), _frozen(self.module) if learns else nullcontext():
                self._run(graph, inputs, measured, attachments, sink)
        except InterposeError:
            # The module may do otherwise now than when it was measured, in ways that nothing tells.
            self._kept.clear()
            raise

    # -- measuring ---------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, nn.Module]:
        if any(map(is_lazy, self.module.parameters())):
            raise BadArgument("it has no weights yet: run a lazy module once before it is looked into")
        return dict(self.module.named_modules())

    def _as_it_is(self, inputs: Given) -> Measurement:
        watch = Watch(self.module, self._modules())
        order, _ = self._watched(watch, inputs, 1)
        return self._measurement(watch, order)

    def _by_rows(self, inputs: Given) -> Measurement:
        watch = Watch(self.module, self._modules())
        rows = given.count(inputs, self.rows)
        shown = [
            self._watched(watch, given.resized(inputs, self.rows, count), count)
            for count in (rows, rows + 1, rows + 2)
        ]
        if any(order != shown[0][0] for order, _ in shown):
            raise BadArgument(
                "it calls other modules for other numbers of rows, so prompts can't share its forward"
            )
        found = self._measurement(watch, shown[0][0])
        layout = found.manifest.modules[""].points.get("output")
        for path, alone in nests.tensors(shown[0][1]):
            leaf = walk(layout, path)
            if isinstance(leaf, Leaf) and leaf.by_rows:
                dim = leaf.dims.index(BATCH)
                if not _alike(alone, nests.at(shown[1][1], path).narrow(dim, 0, rows)):
                    raise BadArgument(
                        "its rows change with their neighbours (batch statistics or dropout in training mode?), so "
                        "prompts can't share its forward; trace them one by one, in a session"
                    )
        return found

    def _watched(self, watch: Watch, inputs: Given, rows: int) -> tuple[list[tuple[str, str]], Any]:
        args, kwargs = given.copied(inputs)
        try:
            recorder, output = watch.record(Size(rows, 0, 0), kwargs, args)
        except InterposeError:
            raise
        except Exception as error:
            raise BadArgument(f"{self.name} fails on these inputs: {_said(error)}") from error
        return recorder.order, output

    def _measurement(self, watch: Watch, order: Sequence[tuple[str, str]]) -> Measurement:
        return Measurement(self._manifest(watch.described(order)), frozenset(watch.rewritten))

    def _manifest(self, modules: Mapping[str, Any]) -> Manifest:
        return Manifest(
            model=self.name,
            revision="",
            architecture=type(self.module).__name__,
            dtype=weights_dtype(self.module),
            modules=modules,
            attention="",
            versions=versions(),
        )

    # -- running -----------------------------------------------------------------------------------------------

    def _run(
        self,
        graph: Graph,
        inputs: Inputs,
        measured: Sequence[Measurement],
        attachments: Mapping[str, Tensor],
        sink: Sink,
    ) -> None:
        modules = self._modules()
        device = device_of(self.module)
        world = World(modules, device, measured[0].manifest)
        known = _checked(graph, measured)
        job = Interpreter(
            compile_graph(graph), known, attachments, sink, UNLIMITED, world, set(), {}, exclusive=True
        )
        try:
            with torch.set_grad_enabled(bool(job.plan.backwards)):
                job.begin()
                for run in (run for level in job.plan.levels for run in level):
                    if job.error is None and not job.plan.idle(run):
                        self._forward(job, run, inputs[run], self._loaded(measured[run], modules, device))
        finally:
            job.gradients.close()
        if job.error is not None:
            raise job.error

    def _forward(self, job: Interpreter, run: int, inputs: Sequence[Given], loaded: Loaded) -> None:
        args, kwargs = given.joined(inputs, self.rows)
        span = Span.whole(job.plan.graph.runs[run].rows, 0, 0)
        forward = Forward(loaded, [place(job, run, span)], span)
        try:
            forward.run(kwargs, args)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"{self.name} doesn't fit the device's memory on these inputs") from error
        except Exception as error:
            if job.error is None:
                raise OpFailed(f"{self.name} fails while its forward runs: {_said(error)}") from error
        forward.finish()

    def _loaded(self, measured: Measurement, modules: dict[str, nn.Module], device: torch.device) -> Loaded:
        names = {module: path for path, module in modules.items()}
        feeding = Feeding(frozenset(), note="it takes inputs of its own")
        return Loaded(self.module, measured.manifest, None, names, modules, device, feeding, measured.rewritten)


def _surroundings() -> tuple[Any, ...]:
    """What of a block's surroundings changes the dtypes a module computes in."""
    casting = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    return torch.get_default_dtype(), tuple(casting.items())


def _compiled(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted or hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _checked(graph: Graph, measured: Sequence[Measurement]) -> tuple[Known, ...]:
    """What is known of each node, by the measurement of its run."""
    checker = Checker(measured[0].manifest, graph.runs, graph.attachments)
    for node in graph.nodes:
        checker.manifest = measured[node.run].manifest
        checker.add(node)
        if node.invoke is not None and len(graph.runs[node.run].invokes) > 1:
            _check_own(node, checker.manifest)
    return tuple(checker.known)


def _check_own(node: Node, manifest: Manifest) -> None:
    """One of several prompts reads what has its rows, or what is the same for all, and writes only its rows.

    Raises BadArgument.
    """
    if node.point is None:
        return
    layout = walk(manifest.module(node.point.module).points[node.point.name], node.point.path)
    for leaf in leaves(layout):
        if not leaf.by_rows and (node.op == "write" or UNKNOWN in leaf.dims):
            raise BadArgument(
                f"{node.point} can't be told apart by rows: use it where all prompts are seen, with t.invoke():"
            ).at(node.id, node.op, node.source)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Nothing inside adds to the gradients of a module's own parameters."""
    learning = [own for own in (*module.parameters(), *module.buffers()) if own.requires_grad and own.is_leaf]
    for own in learning:
        own.requires_grad_(False)
    try:
        yield
    finally:
        for own in learning:
            own.requires_grad_(True)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal but for what reassociation of sums may explain."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = TOLERANCE.get(one.dtype, 0.0)
    expected, found = one.double(), other.double()
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * _largest(expected), equal_nan=True)


def _largest(value: Tensor) -> float:
    finite = value[value.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _said(error: Exception) -> str:
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"
