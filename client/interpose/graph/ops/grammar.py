"""What `x[...]` selects: the grammar of indices over shapes."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, Final

from ...errors import BadArgument, IndexOutOfRange, ShapeMismatch
from ..values import TensorSpec
from .dtypes import INTEGERS
from .kinds import is_spec
from .shapes import Shape, broadcast

_PICKED: Final = -1
"""Stands in a shape for a dimension that an index tensor picks from."""


def indexed(shape: Shape, items: Sequence[Any], most: bool = False) -> Shape | None:
    """The shape of `x[items]`, None if it depends on values.

    Args:
        most: take everything a mask or a computed slice could select, for a bound.

    Raises:
        IndexOutOfRange: an integer outside its dimension, or too many items.
        ShapeMismatch: a mask of another shape, or index tensors that don't broadcast.
    """
    walk = _Walk(shape, most)
    for item in _spread(items, len(shape)):
        walk.take(item)
    return walk.result()


def _spread(items: Sequence[Any], ndim: int) -> list[Any]:
    """The items with `...` written out, and slices for the dimensions left over."""
    used = sum(_consumes(item) for item in items)
    if used > ndim:
        raise IndexOutOfRange(f"{used} indices for a tensor with {ndim} dimensions")
    rest = [slice(None)] * (ndim - used)
    at = [n for n, item in enumerate(items) if isinstance(item, EllipsisType)]
    assert len(at) < 2, "bind lets one through"
    if at:
        return [*items[: at[0]], *rest, *items[at[0] + 1 :]]
    return [*items, *rest]


def _consumes(item: Any) -> int:
    if item is None or isinstance(item, EllipsisType):
        return 0
    if isinstance(item, TensorSpec) and item.dtype == "bool":
        return len(item.shape)
    if isinstance(item, list) and _is_mask(item):
        return len(list_shape(item))
    return 1


def list_shape(items: Any) -> Shape:
    """The shape of nested lists of equal lengths."""
    shape = []
    while isinstance(items, list):
        shape.append(len(items))
        items = items[0] if items else None
    return tuple(shape)


def leaves(items: Any) -> list[Any]:
    """The numbers of nested lists."""
    return [leaf for item in items for leaf in leaves(item)] if isinstance(items, list) else [items]


def _is_mask(items: list[Any]) -> bool:
    return any(isinstance(leaf, bool) for leaf in leaves(items)[:1])


def check_position(index: int, size: int, what: str = "index") -> None:
    """Raises IndexOutOfRange unless -size <= index < size."""
    if not -size <= index < size:
        raise IndexOutOfRange(
            f"{what} {index} is out of range for a dimension of size {size}", details={"index": index, "size": size}
        )


class _Walk:
    """Goes over index items and the dimensions they meet."""

    def __init__(self, shape: Shape, most: bool) -> None:
        self.left = list(shape)
        self.most = most
        self.sizes: list[int] = []
        self.picks: list[Shape] = []
        self.open = False

    def take(self, item: Any) -> None:
        if item is None:
            self.sizes.append(1)
        elif isinstance(item, slice):
            self.sizes.append(self._slice(item, self.left.pop(0)))
        elif isinstance(item, list):
            self._list(item)
        elif isinstance(item, TensorSpec):
            self._tensor(item)
        else:
            check_position(item, self.left.pop(0))

    def _slice(self, item: slice, size: int) -> int:
        if is_spec(item.step) or (item.step is not None and item.step <= 0):
            raise BadArgument("a slice's step must be a positive integer; flip(dim) reverses")
        if is_spec(item.start) or is_spec(item.stop):
            self.open = True
            return size
        return len(range(*item.indices(size)))

    def _pick(self, shape: Shape, dims: int = 1) -> None:
        self.picks.append(shape)
        self.sizes.extend([_PICKED] * dims)

    def _list(self, item: list[Any]) -> None:
        if _is_mask(item):
            self._mask(list_shape(item))
            self._pick((sum(leaves(item)),), len(list_shape(item)))
            return
        size = self.left.pop(0)
        for index in leaves(item):
            check_position(index, size)
        self._pick(list_shape(item))

    def _tensor(self, spec: TensorSpec) -> None:
        if spec.dtype == "bool":
            self._mask(spec.shape)
            self.open = True
            # A mask without dimensions adds one of size 0 or 1.
            self._pick((spec.numel,), max(len(spec.shape), 1))
            return
        if spec.dtype not in INTEGERS or spec.dtype == "uint8":
            raise BadArgument(f"an index tensor is of a signed integer dtype or bool, not {spec.dtype}")
        self.left.pop(0)
        # Without dimensions it selects, as an integer does.
        if spec.shape:
            self._pick(spec.shape)

    def _mask(self, shape: Shape) -> None:
        met = tuple(self.left[: len(shape)])
        if met != shape:
            raise ShapeMismatch(f"a mask of shape {list(shape)} over dimensions of shape {list(met)}")
        del self.left[: len(shape)]

    def result(self) -> Shape | None:
        if self.open and not self.most:
            return None
        if not self.picks:
            return tuple(self.sizes)
        picked = broadcast(*self.picks) if not self.open else _widest(self.picks)
        at = [n for n, size in enumerate(self.sizes) if size == _PICKED]
        kept = [size for size in self.sizes if size != _PICKED]
        together = at[-1] - at[0] + 1 == len(at)
        first = at[0] if together else 0
        return (*kept[:first], *picked, *kept[first:])


def _widest(shapes: list[Shape]) -> Shape:
    """A bound on the broadcast shape, where some sizes are only bounds themselves."""
    ndim = max(map(len, shapes))
    padded = [(1,) * (ndim - len(shape)) + shape for shape in shapes]
    return tuple(max(sizes) for sizes in zip(*padded, strict=True))
