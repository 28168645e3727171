"""What a job saves: each value leaves when it is final, those of a body of steps together when their run ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graph.limits import Limits
from ..graph.model import Node
from . import nests
from .held import compact
from .plan import MOMENTS, Plan
from .sink import Adopting, Sink


class Saves:
    """The saves of one job.

    Attributes:
        gone: save nodes whose values have left, in an earlier attempt too, and logs that were told.
        bytes: saved so far.
    """

    def __init__(self, plan: Plan, sink: Sink, limits: Limits, gone: set[int]) -> None:
        self.gone = gone
        self.bytes = 0
        self._plan = plan
        self._sink = sink
        self._limits = limits
        self._lists: dict[int, list[Any]] = {}

    def keep(self, node: Node, value: Any) -> None:
        """Save a value. Raises LimitExceeded."""
        value = nests.transform(value, self._taken)
        self._limits.check("result_bytes", self.bytes)
        if self._repeats(node):
            self._lists.setdefault(node.id, []).append(value)
        else:
            self._emit(node, value)

    def _taken(self, tensor: torch.Tensor) -> torch.Tensor:
        own = compact(tensor.detach())
        self.bytes += own.nbytes
        return own

    def adopt(self, node: Node, saved: Any, stored: Callable[[int], Any]) -> None:
        """What a shard made: its value, or word of where that goes by itself; `stored` says whether it is there.

        Raises LimitExceeded.
        """
        if "value" in saved:
            self.bytes += sum(tensor.nbytes for _, tensor in nests.tensors(saved["value"]))
            self._limits.check("result_bytes", self.bytes)
            self._emit(node, saved["value"])
        elif node.id not in self.gone:
            assert isinstance(self._sink, Adopting), "a sink that gives its address takes what leaves by itself"
            self._sink.adopt(node.id, saved, stored)
            self.gone.add(node.id)

    def missing(self, plan: Plan) -> list[Node]:
        """Saves of a whole plan that must have left and haven't.

        Those of branches needn't, nor what comes of a generation, which may end before a step.
        """
        nodes, growing = plan.graph.nodes, set[int]()
        for node in nodes:
            grows = node.op in MOMENTS and plan.graph.runs[node.run].kind == "generate"
            if grows or not growing.isdisjoint(plan.needs[node.id]):
                growing.add(node.id)
        return [
            node
            for node in plan.nodes("save")
            if node.id not in self.gone | growing
            and not any(nodes[control].op == "branch" for control in plan.scope[node.id])
        ]

    def skip(self, node: Node) -> None:
        """A save in a branch that wasn't taken: one that repeats keeps its step's place."""
        if self._repeats(node):
            self._lists.setdefault(node.id, []).append(None)

    def end_run(self, run: int) -> None:
        """Hand out what was gathered over the steps of a run."""
        for node in self._plan.nodes("save"):
            if node.run == run and self._repeats(node):
                self._emit(node, self._lists.pop(node.id, []))

    def tell(self, node: Node, text: str) -> None:
        """Log a line."""
        # A job that has to be run again says nothing twice; in a body of steps it may say something new.
        if node.id not in self.gone or self._repeats(node):
            self.gone.add(node.id)
            self._sink.log(node.id, text)

    def _repeats(self, node: Node) -> bool:
        return self._plan.template_of(node.id) is not None

    def _emit(self, node: Node, value: Any) -> None:
        if node.id not in self.gone:
            self._sink.save(node.id, value)
            # Only now: what the sink didn't take, as it had no room or no memory, the next attempt saves.
            self.gone.add(node.id)
