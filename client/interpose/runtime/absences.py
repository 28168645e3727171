"""Rows whose text has ended while others of their run go on.

The model is fed filling there, so what it makes of them is no value, and must not pass for one. A read whose rows
have all ended is absent, with all that is computed from it. Where some have ended, their floating-point numbers are
nan, and so is what is computed from them; where that is no floating-point number (an argmax, a comparison), its
absent elements are kept track of, and a save gives them as the smallest integer of their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InterposeError, NotReached
from ..graph import ops
from ..graph.manifest import BATCH, BATCH_SEQ, Leaf
from ..graph.model import Node
from ..graph.ops.pointwise import family as pointwise
from ..graph.values import Ref, refs, substitute
from . import kernels
from .rows import Span
from .skipped import ABSENT

Look = Callable[[int], Any]

ALONG = frozenset({"argmax", "argmin", "any", "all", "count_nonzero", "sum", "prod", "amax", "amin", "mean"})
"""Reductions of a dimension whose result depends on that dimension alone."""

PICKS = frozenset({"topk", "sort", "argsort", "max", "min", "cummax", "cummin", "kthvalue", "mode", "median"})
"""The same, where the dimension stays or two results come."""

_WRITTEN = "what is written comes from rows that have ended by this step; t.alive tells which go on"
_CONDITION = "this condition comes from rows that have ended by this step; t.alive tells which go on"


class Absences:
    """What one job's values owe to rows that have ended."""

    def __init__(self) -> None:
        self._ended: dict[int, tuple[bool, ...]] = {}
        self._holed: set[int] = set()
        """Nodes whose floating-point values are nan where absent."""
        self._masks: dict[int, Any] = {}
        """Nodes of other values -> which elements are absent; a tuple of these for several results."""

    def begin_step(self, run: int, ended: Sequence[bool]) -> None:
        """Note which rows of a run have ended before this step."""
        self._ended[run] = tuple(ended)

    def forget(self, node: int) -> None:
        self._holed.discard(node)
        self._masks.pop(node, None)

    def ended(self, run: int) -> tuple[bool, ...] | None:
        """Which rows of a run had ended before the step that is under way; None outside generations."""
        return self._ended.get(run)

    def marks(self, node: int) -> tuple[bool, Any]:
        """What is noted of a node's value, for another site."""
        return node in self._holed, self._masks.get(node)

    def mark(self, node: int, marks: tuple[bool, Any]) -> None:
        """Note of a value what another site noted."""
        holed, mask = marks
        if holed:
            self._holed.add(node)
        if mask is not None:
            self._masks[node] = mask

    def over(self, run: int, view: Span) -> bool:
        """Whether all rows of a part of a run have ended."""
        ended = self.rows(run, view)
        return bool(ended) and all(ended)

    def concerns(self, values: object) -> bool:
        """Whether anything among some arguments comes from rows that have ended."""
        return self._concern(refs(values))

    def _concern(self, nodes: Sequence[int]) -> bool:
        if not self._holed and not self._masks:
            return False
        return any(ref in self._holed or ref in self._masks for ref in nodes)

    def read(self, node: Node, layout: Any, view: Span, value: Any) -> Any:
        """What a read gives: the value with nan in the rows that have ended, or ABSENT."""
        ended = self.rows(node.run, view)
        if not any(ended):
            return value
        if all(ended) or not isinstance(layout, Leaf) or not layout.by_rows:
            return ABSENT
        absent = _by_rows(layout, value, ended)
        if not _holds_nan(value):
            self._masks[node.id] = absent
            return value
        self._holed.add(node.id)
        return value.masked_fill(absent, torch.nan)

    def check_written(self, node: Node, layout: Any, view: Span, before: Tensor, after: Tensor) -> None:
        """Raises NotReached if rows that go on were given what comes from rows that have ended."""
        new = after.isnan() & ~before.isnan()
        ended = self.rows(node.run, view)
        if any(ended) and isinstance(layout, Leaf) and layout.by_rows:
            new &= ~_by_rows(layout, after, ended)
        if new.any() or any(ref in self._masks for ref in node.refs):
            raise NotReached(_WRITTEN)

    def check_condition(self, node: Node) -> None:
        """Raises NotReached if a condition comes from rows that have ended."""
        if self.concerns(node.args):
            raise NotReached(_CONDITION)

    def follow(self, node: Node, value: Any, look: Look) -> Any:
        """The result of a node some of whose arguments are partly absent, with that noted."""
        if not self._concern(node.refs):
            return value
        values = value if isinstance(value, tuple) else (value,)
        absent = self._absent(node, values, look)
        found, masks = [], []
        for part, mask in zip(values, absent, strict=True):
            if isinstance(part, Tensor) and _holds_nan(part):
                part, mask = (part if mask is None else part.masked_fill(mask, torch.nan)), None
                if bool(part.isnan().any()):
                    self._holed.add(node.id)
            found.append(part)
            masks.append(mask if mask is not None and bool(mask.any()) else None)
        if any(mask is not None for mask in masks):
            self._masks[node.id] = tuple(masks) if isinstance(value, tuple) else masks[0]
        return tuple(found) if isinstance(value, tuple) else found[0]

    def saved(self, node: Node, value: Any) -> Any:
        """A value as a save gives it: absent elements are the smallest integer; ABSENT where none can say so."""
        mask = next((self._masks[ref] for ref in node.refs if ref in self._masks), None)
        if mask is None:
            return value
        if not isinstance(value, Tensor) or value.dtype in (torch.bool, torch.uint8) or bool(mask.all()):
            return ABSENT
        return value.masked_fill(mask, torch.iinfo(value.dtype).min)

    def rows(self, run: int, view: Span) -> tuple[bool, ...]:
        return self._ended.get(run, ())[view.row : view.row + view.rows]

    # -- which elements of a result are absent -----------------------------------------------------------------

    def _absent(self, node: Node, values: Sequence[Any], look: Look) -> list[Tensor | None]:
        """By result; None where nan tells."""
        marked = any(ref in self._masks for ref in node.refs)
        if not marked and node.op != "end_loop" and all(_holds_nan(value) for value in values):
            return [None] * len(values)
        try:
            found = self._rule(node, values, look)
        except (InterposeError, RuntimeError, TypeError, IndexError):
            found = None
        if found is not None and len(found) == len(values):
            return found
        return [torch.ones_like(part, dtype=torch.bool) if isinstance(part, Tensor) else None for part in values]

    def _rule(self, node: Node, values: Sequence[Any], look: Look) -> list[Tensor | None] | None:
        """By the op, if that tells; else None, and everything is absent."""
        op = ops.OPS.get(node.op)
        if node.op == "choose":
            chosen = node.args[2] if look(node.args[0].id) else node.args[3]
            return [self._of(chosen.id, values[0])]
        if op is None:
            return None
        if node.op in pointwise.ops:
            return [self._elementwise(node, values[0], look)]
        first = node.args[0]
        if not isinstance(first, Ref) or self.concerns((*node.args[1:], *node.kwargs.values())):
            return None
        mask = self._masks.get(first.id)
        if isinstance(mask, tuple):
            return [mask[node.args[1]]] if node.op == "getitem" else None
        mask = self._of(first.id, look(first.id))
        if mask is None:
            return None
        rest = node.args[1:]
        if op.view:
            kwargs = {name: substitute(arg, look) for name, arg in node.kwargs.items()}
            seen = kernels.execute(node.op, (mask, *(substitute(arg, look) for arg in rest)), kwargs)
            return [part.bool() for part in (seen if isinstance(seen, tuple) else (seen,))]
        bound = ops.bind(op, [mask, *rest], node.kwargs, kernels.is_tensor)
        dim = bound.get("dim")
        if dim is None or node.op not in ALONG | PICKS:
            return None
        narrowed = mask.any(dim, keepdim=True)
        if node.op in ALONG and not bound.get("keepdim"):
            return [mask.any(dim)]
        return [
            (narrowed if part.dim() == narrowed.dim() else narrowed.squeeze(dim)).expand(part.shape)
            for part in values
        ]

    def _elementwise(self, node: Node, value: Tensor, look: Look) -> Tensor:
        if node.op == "where" and len(node.args) == 3:
            condition, one, other = node.args
            mask = look(condition.id)
            one, other = (self._mask(arg, look).to(mask.device) for arg in (one, other))
            chosen = torch.where(mask, one, other)
            return (chosen | self._mask(condition, look)).expand(value.shape)
        found = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
        for arg in (*node.args, *node.kwargs.values()):
            found = found | self._mask(arg, look).to(value.device)
        return found

    def _mask(self, arg: Any, look: Look) -> Tensor:
        """Which elements of an argument are absent, where all are of one tensor."""
        masks = [self._of(ref, look(ref)) for ref in refs(arg)]
        known = [mask for mask in masks if mask is not None]
        return known[0] if known else torch.zeros((), dtype=torch.bool)

    def _of(self, ref: int, value: Any) -> Tensor | None:
        if ref in self._masks:
            found: Tensor | None = self._masks[ref]
            return found
        return value.isnan() if ref in self._holed and isinstance(value, Tensor) else None


def _holds_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _by_rows(layout: Leaf, value: Tensor, ended: Sequence[bool]) -> Tensor:
    """Which elements belong to rows that have ended. At the steps where rows can have, there is one position."""
    dim = next(place for place, kind in enumerate(layout.dims) if kind in (BATCH, BATCH_SEQ))
    shape = [1] * value.dim()
    shape[dim] = len(ended)
    return torch.tensor(ended, device=value.device).view(shape).expand(value.shape)
