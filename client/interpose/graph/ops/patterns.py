"""einops-style patterns: `b t (h d) -> b h t d`, read by our own parser into reshape, permute, reshape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ...errors import BadArgument, ShapeMismatch
from ..values import TensorSpec
from .declare import Bound, Family, Outputs
from .dtypes import need_floating
from .shapes import Shape

family = Family()

Side = tuple[tuple[str, ...], ...]
"""Dimensions in order, each the axes it is made of."""

_TOKEN = re.compile(r"\s*(\.\.\.|[A-Za-z_][A-Za-z0-9_]*|\d+|[()])")
_DOTS = "..."


@dataclass(frozen=True, slots=True)
class Steps:
    """What a pattern does: split each dimension, reduce, reorder, add axes, join.

    Attributes:
        split: sizes of the input's axes.
        reduced: which of them go.
        order: the rest, permuted.
        grown: sizes with the added axes, and `inserted` where these are.
        shape: of the result.
    """

    split: Shape
    reduced: Shape
    order: Shape
    inserted: Shape
    grown: Shape
    shape: Shape


def _parse_side(text: str, pattern: str) -> Side:
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    at = 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            raise BadArgument(f"pattern {pattern!r}: can't read {text[at:].strip()[:12]!r}")
        at, token = found.end(), found[1]
        if token == "(" and group is None:
            group = []
        elif token == ")" and group is not None:
            dims.append(tuple(group))
            group = None
        elif token in "()":
            raise BadArgument(f"pattern {pattern!r}: unbalanced parentheses")
        elif group is not None:
            group.append(token)
        else:
            dims.append((token,))
    if group is not None:
        raise BadArgument(f"pattern {pattern!r}: unbalanced parentheses")
    return tuple(dims)


@lru_cache(maxsize=512)
def parse(pattern: str) -> tuple[Side, Side]:
    """Both sides of a pattern. Raises BadArgument if it isn't one."""
    left, arrow, right = pattern.partition("->")
    if not arrow or "->" in right:
        raise BadArgument(f"pattern {pattern!r} isn't like 'b t (h d) -> b h t d'")
    sides = _parse_side(left, pattern), _parse_side(right, pattern)
    for side in sides:
        names = [axis for dim in side for axis in dim if not axis.isdigit()]
        if len(set(names)) != len(names):
            raise BadArgument(f"pattern {pattern!r} names an axis twice on one side")
    if any(axis == _DOTS for dim in sides[0] if len(dim) > 1 for axis in dim):
        raise BadArgument(f"pattern {pattern!r}: `...` stands alone on the left")
    return sides


def steps(pattern: str, shape: Shape, known: Mapping[str, int]) -> Steps:
    """What the pattern does to a tensor of that shape. Raises ShapeMismatch if it doesn't fit."""
    left, right = parse(pattern)
    spread = len(shape) - sum(dim != (_DOTS,) for dim in left)
    if spread < 0 or (spread and (_DOTS,) not in left):
        raise ShapeMismatch(f"pattern {pattern!r} is for another number of dims than {list(shape)} has")
    dots = tuple(f"...{n}" for n in range(spread))
    left, right = _spread(left, dots), _spread(right, dots)
    sizes = _axis_sizes(left, shape, known, pattern)
    source = [axis for dim in left for axis in dim if axis != "1"]
    wanted = _numbered([axis for dim in right for axis in dim], sizes)
    missing = [axis for axis in wanted if axis not in sizes]
    if missing:
        raise BadArgument(f"pattern {pattern!r}: the size of {missing[0]!r} isn't known; give {missing[0]}=...")
    kept = [axis for axis in source if axis in wanted]
    order = [axis for axis in wanted if axis in kept]
    flat = iter(wanted)
    joined = tuple(math.prod(sizes[next(flat)] for _ in dim) for dim in right)
    return Steps(
        split=tuple(sizes[axis] for axis in source),
        reduced=tuple(at for at, axis in enumerate(source) if axis not in wanted),
        order=tuple(kept.index(axis) for axis in order),
        inserted=tuple(at for at, axis in enumerate(wanted) if axis not in kept),
        grown=tuple(sizes[axis] for axis in wanted),
        shape=joined,
    )


def _spread(side: Side, dots: tuple[str, ...]) -> Side:
    wide: list[tuple[str, ...]] = []
    for dim in side:
        if dim == (_DOTS,):
            wide.extend((axis,) for axis in dots)
        elif _DOTS in dim:
            at = dim.index(_DOTS)
            wide.append((*dim[:at], *dots, *dim[at + 1 :]))
        else:
            wide.append(dim)
    return tuple(wide)


def _numbered(axes: list[str], sizes: dict[str, int]) -> list[str]:
    """Axes written as numbers get names of their own."""
    named = []
    for at, axis in enumerate(axes):
        if axis.isdigit():
            size, axis = int(axis), f"#{at}"
            sizes[axis] = size
        named.append(axis)
    return named


def _axis_sizes(left: Side, shape: Shape, known: Mapping[str, int], pattern: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, size in known.items():
        if size < 0:
            raise BadArgument(f"pattern {pattern!r}: {name}={size}")
    for dim, size in zip(left, shape, strict=True):
        if any(axis.isdigit() and axis != "1" for axis in dim):
            raise BadArgument(f"pattern {pattern!r}: only 1 may be written as a number on the left")
        axes = [axis for axis in dim if axis != "1"]
        open_axes = [axis for axis in axes if axis not in known]
        have = math.prod(known[axis] for axis in axes if axis in known)
        if len(open_axes) > 1:
            raise BadArgument(f"pattern {pattern!r}: give the size of {' or '.join(open_axes)}")
        fits = size == have if not open_axes else have > 0 and size % have == 0
        if not fits:
            raise ShapeMismatch(f"pattern {pattern!r}: ({' '.join(dim)}) doesn't fit a size of {size}")
        for axis in axes:
            sizes[axis] = known[axis] if axis in known else size // have
    extra = {axis for axis in known if axis not in sizes}
    return sizes | {axis: known[axis] for axis in extra}


def _planned(bound: Bound) -> Steps:
    return steps(bound["pattern"], bound["input"].shape, bound["sizes"])


def _rearrange(bound: Bound) -> TensorSpec:
    plan = _planned(bound)
    if plan.reduced or any(plan.grown[at] != 1 for at in plan.inserted):
        raise BadArgument(f"rearrange: {bound['pattern']!r} drops or adds axes; use einops_reduce or einops_repeat")
    return TensorSpec(plan.shape, bound["input"].dtype)


def _reduce(bound: Bound) -> TensorSpec:
    plan = _planned(bound)
    if any(plan.grown[at] != 1 for at in plan.inserted):
        raise BadArgument(f"einops_reduce: {bound['pattern']!r} adds axes; use einops_repeat")
    if bound["reduction"] == "mean":
        need_floating(bound["input"].dtype, "mean")
    if bound["reduction"] in ("max", "min") and any(plan.split[at] == 0 for at in plan.reduced):
        raise ShapeMismatch("an extreme of nothing")
    dtype = bound["input"].dtype
    if (
        bound["reduction"] in ("sum", "prod")
        and plan.reduced
        and dtype in ("bool", "uint8", "int8", "int16", "int32")
    ):
        dtype = "int64"
    return TensorSpec(plan.shape, dtype)


def _repeat(bound: Bound) -> TensorSpec:
    plan = _planned(bound)
    if plan.reduced:
        raise BadArgument(f"einops_repeat: {bound['pattern']!r} drops axes; use einops_reduce")
    return TensorSpec(plan.shape, bound["input"].dtype)


def _reduce_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    return 4 * bound["input"].numel, 2 * bound["input"].nbytes


family.declare("- rearrange(input: tensor, pattern: str, **sizes: int)", _rearrange)
family.declare(
    "- einops_reduce(input: tensor, pattern: str, reduction: 'mean'|'sum'|'max'|'min'|'prod', **sizes: int)",
    _reduce,
    _reduce_work,
)
family.declare("- einops_repeat(input: tensor, pattern: str, **sizes: int)", _repeat)
