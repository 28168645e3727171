"""Which dimension of a value is what, from how its sizes vary between runs of different batch and length.

Never from what a size equals: in one run a head count may well be the sequence length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..graph.manifest import BATCH, BATCH_SEQ, IMAGE, KEY, SEQ, UNKNOWN, Layout, Leaf
from ..graph.values import DTYPES

MAX_DEPTH = 7


@dataclass(frozen=True, slots=True)
class Size:
    """Of one run: rows, new positions, positions attention can look back on (`key`), and images."""

    batch: int
    seq: int
    key: int
    images: int = 0

    @property
    def decoding(self) -> bool:
        return self.key != self.seq


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor as one run showed it."""

    sizes: tuple[int, ...]
    dtype: str


Seen: TypeAlias = "Shape | tuple[Seen, ...] | dict[str, Seen] | None"
"""A value as one run showed it; None for what isn't a tensor."""


def observe(value: Any, depth: int = 0) -> Seen:
    """What is kept of a value: its nest of shapes."""
    if isinstance(value, Tensor):
        dtype = dtype_name(value)
        if value.is_nested:
            return None  # its rows have shapes of their own
        return Shape(tuple(value.shape), dtype) if dtype in DTYPES else None
    if depth == MAX_DEPTH:
        return None
    if isinstance(value, (tuple, list)):
        return tuple(observe(item, depth + 1) for item in value)
    if isinstance(value, Mapping):
        return {str(name): observe(item, depth + 1) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: observe(getattr(value, field.name), depth + 1) for field in fields}
    return None


def dtype_name(value: Tensor) -> str:
    """A tensor's: "float32"."""
    return str(value.dtype).removeprefix("torch.")


def weights_dtype(model: nn.Module) -> str:
    """Dtype of the first floating-point weight; "float32" without one."""
    return next((dtype_name(param) for param in model.parameters() if param.is_floating_point()), "float32")


def derive(samples: Sequence[tuple[Size, Seen]]) -> Layout:
    """The layout that explains one value in all runs.

    A tensor which isn't always there, or changes rank or dtype, has one unknown dimension.
    """
    found = [nest for _, nest in samples if nest is not None]
    if not found or len({type(nest) for nest in found}) > 1:
        return None
    if isinstance(found[0], tuple):
        width = max(len(nest) for nest in found if isinstance(nest, tuple))
        return tuple(derive([(size, _item(nest, index)) for size, nest in samples]) for index in range(width))
    if isinstance(found[0], dict):
        names = dict.fromkeys(name for nest in found if isinstance(nest, dict) for name in nest)
        return {name: derive([(size, _item(nest, name)) for size, nest in samples]) for name in names}
    shapes = [(size, nest) for size, nest in samples if isinstance(nest, Shape)]
    return _leaf(shapes, always=len(shapes) == len(samples))


def _item(nest: Seen, key: int | str) -> Seen:
    if isinstance(nest, tuple) and isinstance(key, int):
        return nest[key] if key < len(nest) else None
    return nest.get(str(key)) if isinstance(nest, dict) else None


def _leaf(samples: Sequence[tuple[Size, Shape]], *, always: bool) -> Leaf:
    first = samples[0][1]
    alike = all(len(shape.sizes) == len(first.sizes) and shape.dtype == first.dtype for _, shape in samples)
    if not (always and alike):
        return Leaf((UNKNOWN,), first.dtype)
    rank = range(len(first.sizes))
    return Leaf(tuple(_dim([(size, shape.sizes[d]) for size, shape in samples]) for d in rank), first.dtype)


_MEASURES: Mapping[str, Callable[[Size], int]] = {
    BATCH: lambda size: size.batch,
    SEQ: lambda size: size.seq,
    KEY: lambda size: size.key,
    BATCH_SEQ: lambda size: size.batch * size.seq,
    IMAGE: lambda size: size.images,
}


def _dim(samples: Sequence[tuple[Size, int]]) -> int | str:
    """What one dimension measures: the one thing that fits every run. "seq" if key length is as good."""
    if len({extent for _, extent in samples}) == 1:
        return samples[0][1]
    for name, measure in _MEASURES.items():
        if all(measure(size) == extent for size, extent in samples):
            return name
    return UNKNOWN
