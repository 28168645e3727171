"""The closed table of operations, and finding one by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ...errors import UnknownOp
from . import convert, create, index, join, linalg, losses, matmul, patterns, pointwise, reduce, view
from .binding import match
from .declare import Op
from .kinds import is_spec


def _assemble() -> dict[str, Op]:
    table: dict[str, Op] = {}
    for module in (pointwise, reduce, view, index, matmul, join, losses, create, linalg, convert, patterns):
        assert not table.keys() & module.family.ops.keys(), "an operation is declared in two families"
        table |= module.family.ops
    return table


OPS: Mapping[str, Op] = MappingProxyType(_assemble())
"""Every tensor operation a graph may hold, by name."""

_REFUSED = {
    "item": "a value's number exists only after the block: save() it",
    "tolist": "a value's numbers exist only after the block: save() it",
    "numpy": "a value's numbers exist only after the block: save() it",
    "data": "use detach()",
    "grad": "with loss.backward(): takes gradients, x.grad in it",
    "apply_": "a graph holds operations, not functions",
    "map_": "a graph holds operations, not functions",
    "as_strided": "it looks behind a tensor; index or reshape instead",
    "storage": "it looks behind a tensor",
    "untyped_storage": "it looks behind a tensor",
    "set_": "it looks behind a tensor",
    "resize_": "it looks behind a tensor; use new tensors",
    "empty": "uninitialised memory isn't given out; use zeros",
    "empty_like": "uninitialised memory isn't given out; use zeros_like",
    "new_empty": "uninitialised memory isn't given out; use new_zeros",
    "cuda": "a graph runs where the model is",
    "manual_seed": "random operations take seed=...",
    "tensor": "make the tensor outside; it travels as an attachment when it is used",
}


def lookup(name: str) -> Op:
    """The operation of that name. Raises UnknownOp with the nearest names, or what to do instead."""
    found = OPS.get(name) if isinstance(name, str) else None
    if found is None:
        raise UnknownOp(_unknown(str(name)[:80]))
    return found


def _unknown(name: str) -> str:
    advice = _REFUSED.get(name.rpartition(".")[2])
    if advice is not None:
        return f"{name!r} isn't an operation of graphs: {advice}"
    return f"{name!r} isn't an operation of graphs{nearest(name)}"


def nearest(name: str) -> str:
    """ "; did you mean ..." for a name that isn't an operation, or ""."""
    close = difflib.get_close_matches(name.rpartition(".")[2], list(OPS), 3, 0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def outputs_of(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...] | None:
    """`Op.outputs` for these arguments: `max(x)` is one tensor, `max(x, dim=0)` values and indices."""
    if len(op.signatures) == 1:
        return op.outputs
    return match(op, args, kwargs, is_spec)[0].outputs
