"""What the dimensions of a named point measure, from its place's layout and the ops' shape rules. No torch here."""

from __future__ import annotations

from typing import Any

from . import ops
from .manifest import BATCH, KEY, SEQ, UNKNOWN, Leaf, Manifest, walk
from .model import Point
from .named import Named, View, perform, sized
from .values import TensorSpec

_SIZES = ((1009, 2003, 3001), (1013, 2011, 3011))
"""Rows, positions and keys to try shapes on: no model has both of one kind."""


def leaf(manifest: Manifest, named: Named) -> Leaf:
    """The layout of a named point; one unknown dimension where no rule tells."""
    first, second = (_spec(manifest, named, *sizes) for sizes in _SIZES)
    if not isinstance(first, TensorSpec) or not isinstance(second, TensorSpec):
        return Leaf((UNKNOWN,), manifest.dtype)
    pairs = zip(first.shape, second.shape, strict=True)
    return Leaf(tuple(_dim(one, other) for one, other in pairs), first.dtype)


def _dim(one: int, other: int) -> int | str:
    if one == other:
        return one
    measures = dict(zip(zip(*_SIZES, strict=True), (BATCH, SEQ, KEY), strict=True))
    return measures.get((one, other), UNKNOWN)


def _spec(manifest: Manifest, named: Named, rows: int, seq: int, key: int) -> Any:
    def read(point: Point, views: tuple[View, ...]) -> Any:
        layout = walk(manifest.module(point.module).points[point.name], point.path)
        spec: Any = layout.spec(rows, seq, key) if isinstance(layout, Leaf) else None
        spec = ops.UNKNOWN if spec is None else spec
        for op, *args in sized(views, rows):
            spec = ops.infer(op, (spec, *args), {})
        return spec

    def op(name: str, args: tuple[Any, ...]) -> Any:
        if name != "param":
            return ops.infer(name, args, {})
        param = manifest.module(args[0]).params[args[1]]
        return TensorSpec(param.shape, param.dtype)

    return perform(named.steps, (), read, op) if named.steps else read(named.point, named.views)
