"""Shapes as the check of a graph knows them: of tensors, of nests, of what a layout holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from .manifest import BATCH, BATCH_SEQ, IMAGE, KEY, SEQ, Leaf
from .ops import UNKNOWN
from .values import DTYPES, TensorSpec

Spec: TypeAlias = Any
"""TensorSpec, UNKNOWN, a tuple or dict of these, or None for what isn't a tensor."""

FLOATING = frozenset(name for name in DTYPES if name.startswith(("float", "bfloat")))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows, positions, positions attention looks back on, and images; None where they change from step to step."""

    rows: int | None
    seq: int | None
    key: int | None
    images: int = 0


def spec_of(layout: Any, sizes: Sizes) -> Spec:
    """What a layout holds for so many rows and positions; UNKNOWN where they decide and aren't known."""
    if isinstance(layout, Leaf):
        if sizes.rows is None or sizes.seq is None:
            moving = {SEQ, KEY, BATCH_SEQ, IMAGE} | ({BATCH} if sizes.rows is None else set())
            return UNKNOWN if moving & set(layout.dims) else layout.spec(sizes.rows or 0, 0) or UNKNOWN
        return layout.spec(sizes.rows, sizes.seq, sizes.key, sizes.images) or UNKNOWN
    if isinstance(layout, tuple):
        return tuple(spec_of(item, sizes) for item in layout)
    if isinstance(layout, dict):
        return {name: spec_of(item, sizes) for name, item in layout.items()}
    return None


def flat(spec: Spec) -> list[Spec]:
    """All that a nest of specs holds, in order."""
    if isinstance(spec, (tuple, list)):
        return [leaf for item in spec for leaf in flat(item)]
    if isinstance(spec, dict):
        return [leaf for item in spec.values() for leaf in flat(item)]
    return [spec]


def plain_bytes(value: object) -> int:
    """What a value that is no tensor takes in a save, roughly."""
    return len(value) if isinstance(value, str) else 8 if isinstance(value, (bool, int, float)) else 0


def total(spec: Spec) -> int:
    """Bytes of all tensors in it."""
    return spec.nbytes if isinstance(spec, TensorSpec) else sum(map(nbytes, flat(spec)))


def nbytes(spec: Spec) -> int:
    """Bytes of one tensor; 0 for what is none, or whose shape isn't known."""
    return spec.nbytes if isinstance(spec, TensorSpec) else 0
