"""Sizes and dimensions: broadcasting, negative dims, and what doesn't fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from ...errors import BadArgument, IndexOutOfRange, ShapeMismatch

Shape: TypeAlias = tuple[int, ...]


def broadcast(*shapes: Shape) -> Shape:
    """The common shape. Raises ShapeMismatch naming both sizes."""
    if len(set(shapes)) == 1:
        return shapes[0]
    ndim = max(map(len, shapes), default=0)
    result = [1] * ndim
    for shape in shapes:
        offset = len(result) - len(shape)
        for at, size in enumerate(shape):
            have = result[offset + at]
            if have == size or size == 1:
                continue
            if have != 1:
                listed = " and ".join(str(list(one)) for one in shapes)
                raise ShapeMismatch(f"shapes {listed} don't broadcast: {have} against {size}")
            result[offset + at] = size
    return tuple(result)


def expandable(shape: Shape, target: Shape, what: str) -> None:
    """Raises ShapeMismatch unless `shape` broadcasts to exactly `target`."""
    offset = len(target) - len(shape)
    fits = offset >= 0 and all(size in (1, target[offset + at]) for at, size in enumerate(shape))
    if not fits:
        raise ShapeMismatch(f"{what} of shape {list(shape)} doesn't fit {list(target)}")


def dim_of(dim: int, ndim: int) -> int:
    """`dim` counted from the front. A tensor without dimensions has one for this purpose, as in torch."""
    around = max(ndim, 1)
    if not -around <= dim < around:
        raise IndexOutOfRange(
            f"dim {dim} of a tensor with {ndim} dimensions; it may be {-around} to {around - 1}",
            details={"index": dim, "size": around},
        )
    return dim % around


def dims_of(dims: Iterable[int], ndim: int) -> tuple[int, ...]:
    """Distinct dims counted from the front."""
    found = tuple(dim_of(dim, ndim) for dim in dims)
    if len(set(found)) != len(found):
        raise BadArgument(f"dims {list(found)} name one dimension twice")
    return found


def without(shape: Shape, dims: Iterable[int], keepdim: bool = False) -> Shape:
    """The shape after reducing `dims` (counted from the front)."""
    gone = set(dims)
    if keepdim:
        return tuple(1 if at in gone else size for at, size in enumerate(shape))
    return tuple(size for at, size in enumerate(shape) if at not in gone)


def with_size(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])


def sizes(values: Sequence[int], what: str = "size") -> Shape:
    """Checked sizes of a new tensor."""
    for value in values:
        if value < 0:
            raise BadArgument(f"a {what} can't be negative: {list(values)}")
    return tuple(values)


def fill_in(wanted: Sequence[int], numel: int) -> Shape:
    """The sizes of a view, with a -1 among them worked out."""
    holes = [at for at, size in enumerate(wanted) if size == -1]
    if len(holes) > 1 or any(size < -1 for size in wanted):
        raise BadArgument(f"sizes {list(wanted)}: one may be -1, the others can't be negative")
    rest = math.prod(size for size in wanted if size != -1)
    if holes and rest and numel % rest == 0:
        return with_size(tuple(wanted), holes[0], numel // rest)
    if holes or rest != numel:
        raise ShapeMismatch(f"{numel} elements don't fill the shape {list(wanted)}")
    return tuple(wanted)


def need_ndim(shape: Shape, ndim: int, what: str) -> None:
    """Raises ShapeMismatch unless the tensor has that many dimensions."""
    if len(shape) != ndim:
        raise ShapeMismatch(f"{what} takes a tensor of {ndim} dimensions, not one of shape {list(shape)}")


def same(one: int, other: int, what: str) -> None:
    """Raises ShapeMismatch unless two sizes agree."""
    if one != other:
        raise ShapeMismatch(f"{what}: {one} against {other}")
