"""A graph of reads and writes of named points, made and run by the server itself to prove them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from ...errors import InterposeError
from ...graph.model import Graph, Invoke, Node, Point, Run
from ...graph.named import Effect, Named, View, perform, sized
from ...graph.trim import trimmed
from ...graph.values import Ref, TensorSpec
from ..layouts import dtype_name
from ..pieces import Piece

Name: TypeAlias = tuple[str, str]
"""Owner and name of a point."""


class Sheet:
    """One run of a few equal rows, each an invoke of its own.

    Attributes:
        cause: node -> the named point it was made for.
    """

    def __init__(self, sample: Piece, adapter: str | None = None) -> None:
        self.sample = sample
        self._adapter = adapter
        self.invokes = 0
        self.cause: dict[int, Name] = {}
        self._nodes: list[Node] = []
        self._wanted: dict[tuple[int, Name], int] = {}
        self._about: Name = "", ""

    def invoke(self) -> int:
        self.invokes += 1
        return self.invokes - 1

    def read(self, invoke: int, name: Name, named: Named) -> int:
        self._about = name
        if named.steps:
            return int(self._perform(invoke, named.steps, ()))
        return self._view(invoke, named.point, named.views)

    def write(self, invoke: int, name: Name, named: Named, new: int, old: int) -> None:
        self._about = name
        effects = named.effects or (Effect(named.point, named.views, ()),)
        for effect in effects:
            given = (Ref(new), Ref(old))
            value = self._perform(invoke, effect.steps, given) if effect.steps else new
            args = (sized(effect.views, 1), ..., Ref(value))
            self._node(invoke, "write", args, effect.point)

    def op(self, invoke: int, op: str, *args: Any) -> int:
        return self._node(invoke, op, args)

    def keep(self, invoke: int, name: Name, node: int) -> None:
        """Have a node's value in the answer."""
        self._wanted[invoke, name] = self._node(invoke, "save", (Ref(node),))

    def run(self, engine: Any) -> dict[tuple[int, Name], torch.Tensor]:
        """The kept values. Raises the run's error."""
        from ..engine import EngineJob

        nodes, renumbered = trimmed(self._nodes)
        self.cause = {renumbered[node]: name for node, name in self.cause.items() if node in renumbered}
        names = {name: f"{index:064x}" for index, name in enumerate(self.sample.tensors)}
        tensors = {names[name]: tensor for name, tensor in self.sample.tensors.items()}
        invoke = Invoke(tuple(map(tuple, self.sample.rows)), names)
        specs = {key: TensorSpec(tuple(tensor.shape), dtype_name(tensor)) for key, tensor in tensors.items()}
        graph = Graph((Run("trace", (invoke,) * self.invokes, adapter=self._adapter),), nodes, specs)
        sink = _Kept()
        error: InterposeError | None
        (error,) = engine.run([EngineJob(graph, tensors, sink, exclusive=True)])
        if error is not None:
            raise error
        return {key: sink.values[renumbered[node]] for key, node in self._wanted.items()}

    def _perform(self, invoke: int, steps: Sequence[Any], given: Sequence[Ref]) -> int:
        def read(point: Point, views: tuple[View, ...]) -> Ref:
            return Ref(self._view(invoke, point, views))

        def op(name: str, args: tuple[Any, ...]) -> Ref:
            return Ref(self._node(invoke, name, args))

        found: Ref = perform(steps, given, read, op)
        return found.id

    def _view(self, invoke: int, point: Point, views: tuple[View, ...]) -> int:
        node = self._node(invoke, "read", (), point)
        for op, *args in sized(views, 1):
            node = self._node(invoke, op, (Ref(node), *args))
        return node

    def _node(self, invoke: int, op: str, args: tuple[Any, ...], point: Point | None = None) -> int:
        node = Node(len(self._nodes), op, args, point=point, invoke=invoke)
        self._nodes.append(node)
        self.cause[node.id] = self._about
        return node.id


class _Kept:
    def __init__(self) -> None:
        self.values: dict[int, torch.Tensor] = {}

    def save(self, node: int, value: Any) -> None:
        self.values[node] = value.clone()

    def log(self, node: int, text: str) -> None:
        pass

    def tokens(self, run: int, step: int, ids: Sequence[int | None]) -> None:
        """Nothing is generated."""

    def cancelled(self) -> bool:
        return False
