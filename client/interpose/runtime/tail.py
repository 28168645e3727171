"""Logits of last positions alone, where nobody in a shared forward looks at others.

A language model's head is a good part of its work, and most jobs read one row of what it makes. This cut changes
bits, as a product of fewer rows is summed in another order, so forwards of one run alone never take it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..graph.model import Node
from ..graph.values import Ref
from . import nests
from .feeding import examples
from .hooks import Onlooker, hooked
from .inputs import principal
from .loading import Loaded
from .pieces import joined
from .plan import Place, Plan
from .rows import Span

ARGUMENT = "logits_to_keep"
_DIMS = 3
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Dtype -> by how much of the largest value two ways to the same logits may differ."""


@dataclass(frozen=True)
class Tail:
    """What of a model comes after positions can be dropped.

    Attributes:
        head: path of the module that makes logits.
        modules: paths of all that is given, or gives, fewer positions then: the model, the head, what lies between.
    """

    head: str
    modules: frozenset[str]

    def touches(self, place: Place) -> bool:
        module, event, _ = place
        return module in self.modules and (module != "" or event != "enter")

    def last_only(self, plan: Plan, run: int) -> frozenset[int] | None:
        """A run's reads of logits, if they look at last positions alone; None if it touches more of the tail."""
        found = set()
        for place, nodes in plan.at(run, 0).items():
            if not self.touches(place):
                continue
            for node in nodes:
                logits = place == (self.head, "exit", 0) or (
                    place == ("", "exit", 0) and _path(node) == ("logits",)
                )
                if not logits or node.op != "read" or node.id in plan.gradients or not _last(plan, node.id, 0):
                    return None
                found.add(node.id)
        return frozenset(found)


@dataclass(frozen=True)
class Cut:
    """One forward that keeps the last positions of its runs, in order.

    Attributes:
        widths: of the runs; each ends at its own last position of the batch.
        before: how many positions of each run aren't in the batch, as they were computed before.
    """

    tail: Tail
    widths: Sequence[int]
    before: int = 0

    @cached_property
    def positions(self) -> list[int]:
        return sorted({width - 1 for width in self.widths})

    @property
    def argument(self) -> dict[str, Any]:
        """What the model's forward is told."""
        return {ARGUMENT: 1 if len(self.positions) == 1 else torch.tensor(self.positions)}

    def whole(self, of: Span) -> Span:
        """The batch after the cut."""
        return replace(of, length=len(self.positions))

    def part(self, of: Span) -> Span:
        """A run's part of it: one position."""
        return replace(of, start=self.positions.index(of.start + of.length - 1 - self.before), length=1)


@dataclass
class _Shapes(Onlooker):
    """Notes the shapes of what modules take and give."""

    attention = False
    seen: dict[Place, list[torch.Size]] = field(default_factory=dict)

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        self.seen[module, event, call] = [tensor.shape for _, tensor in nests.tensors(value)]
        return value


@torch.no_grad()
def measure(loaded: Loaded) -> Tail | None:
    """The tail of a model whose forward keeps the positions it is told to, proved on a short run; None without."""
    head = loaded.manifest.roles.get("unembed")
    if head is None or ARGUMENT not in loaded.feeding.accepts or not (loaded.feeding.works and loaded.feeding.ids):
        return None
    inputs = joined([examples(loaded.model, loaded.feeding, [6, 6])], loaded.feeding.inputs, loaded.device)
    kwargs = loaded.feeding.kwargs(inputs)
    whole, shapes = _run(loaded, kwargs)
    modules = {"", head}
    for keep in (1, torch.tensor([2, 5], device=loaded.device)):
        kept, fewer = _run(loaded, {**kwargs, ARGUMENT: keep})
        wanted = whole[:, -1:] if isinstance(keep, int) else whole[:, keep]
        tolerance = CLOSE.get(whole.dtype, 3e-2) * float(wanted.abs().max())
        if kept.shape != wanted.shape or float((kept - wanted).abs().max()) > tolerance:
            return None
        modules |= {place[0] for place, seen in shapes.items() if fewer.get(place) != seen}
    return Tail(head, frozenset(modules))


def _run(loaded: Loaded, kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, dict[Place, list[torch.Size]]]:
    """The logits, and the shapes of what every module here takes and gives."""
    shapes = _Shapes()
    with hooked(loaded.own, loaded.names, shapes):
        return principal(loaded.model(**kwargs)), shapes.seen


def _path(node: Node) -> tuple[Any, ...]:
    assert node.point is not None
    return node.point.path


def _last(plan: Plan, node: int, gone: int) -> bool:
    """Whether a value [rows, positions, vocabulary] is used only through its last position.

    Args:
        gone: dimensions before that of positions which earlier indices took away.
    """
    return all(_picks_last(plan, plan.graph.nodes[user], node, gone) for user in plan.users[node])


def _picks_last(plan: Plan, user: Node, node: int, gone: int) -> bool:
    if user.op != "getitem" or user.args[0] != Ref(node) or user.id in plan.gradients:
        return False
    index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    items = spread(index, _DIMS - gone)
    if items is None:
        return False
    positions = items[1 - gone]
    if not gone:
        one_row = type(items[0]) is int
        if isinstance(positions, slice) and positions == slice(None):
            # One row's positions: what is made of them may still look at the last alone.
            return one_row and _last(plan, user.id, 1)
        if not one_row and not isinstance(items[0], slice):
            return False
    return (
        positions == slice(-1, None) if isinstance(positions, slice) else type(positions) is int and positions == -1
    )


def spread(index: Sequence[Any], dims: int) -> list[Any] | None:
    """One item a dimension, with slices for those that aren't named; None for what adds or hides dimensions."""
    if any(item is None or isinstance(item, (bool, list, Ref)) for item in index):
        return None
    if ... in index:
        at = [item is ... for item in index].index(True)
        index = (*index[:at], *[slice(None)] * (dims - len(index) + 1), *index[at + 1 :])
    return [*index, *[slice(None)] * (dims - len(index))] if len(index) <= dims else None
