"""The part of a shared forward that belongs to one job, one run, one invoke.

Rows of one run are left-padded together, so a run is a block of rows whose tokens end at its own length; several
runs share a forward by padding on the right. An invoke's part is its rows and the last `longest` positions of its
run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ShapeMismatch
from ..graph.manifest import BATCH, BATCH_SEQ, IMAGE, KEY, SEQ, Leaf


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a batch: rows [row, row + rows), positions [start, start + length), of the positions attention
    looks back on, which a cache makes more, [key, key + keys), and images [image, image + images)."""

    row: int
    rows: int
    start: int
    length: int
    key: int
    keys: int
    image: int = 0
    images: int = 0

    @classmethod
    def whole(cls, rows: int, length: int, keys: int, images: int = 0) -> Span:
        return cls(0, rows, 0, length, 0, keys, 0, images)

    @property
    def itself(self) -> Span:
        """All of this part, relative to it."""
        if not (self.row or self.start or self.key or self.image):
            return self
        return Span.whole(self.rows, self.length, self.keys, self.images)

    def within(self, outer: Span) -> Span:
        """This part, given relative to another, in terms of what that one is given in."""
        return Span(
            outer.row + self.row,
            self.rows,
            outer.start + self.start,
            self.length,
            outer.key + self.key,
            self.keys,
            outer.image + self.image,
            self.images,
        )


@dataclass(frozen=True, slots=True)
class View:
    """How to cut a span out of tensors of one layout.

    Dimensions that hold batch and positions in one are opened into two first, so that a cut stays a view.

    Attributes:
        of: what the tensors hold, as a span that starts at 0.
    """

    leaf: Leaf
    span: Span
    of: Span

    @property
    def whole(self) -> bool:
        """Whether the cut would leave everything: always so for values that don't belong to rows."""
        return not self.leaf.by_rows or self.span is self.of or self.span == self.of

    def open(self, tensor: torch.Tensor) -> torch.Tensor:
        """The cut with batch and positions apart, sharing memory with `tensor`."""
        dims = list(self.leaf.dims)
        of = self.of
        keys = of.keys
        if of.length == 1 and KEY in dims and len(dims) == tensor.dim():
            keys = min(keys, tensor.shape[dims.index(KEY)])  # a cache with a window lets go of the oldest
        gone = of.keys - keys
        sizes = {BATCH: of.rows, SEQ: of.length, KEY: keys, BATCH_SEQ: of.rows * of.length, IMAGE: of.images}
        if len(dims) != tensor.dim() or any(
            size != sizes.get(str(dim), size) for dim, size in zip(dims, tensor.shape, strict=True)
        ):
            raise ShapeMismatch(
                f"the model made a value of shape {list(tensor.shape)} where {dims} was measured; "
                'run with batching="exclusive" and read it whole'
            )
        if BATCH_SEQ in dims:
            place = dims.index(BATCH_SEQ)
            dims[place : place + 1] = [BATCH, SEQ]
            tensor = tensor.unflatten(place, (of.rows, of.length))  # type: ignore[no-untyped-call]
        span = self.span
        for place, dim in enumerate(dims):
            if dim == BATCH:
                tensor = tensor.narrow(place, span.row, span.rows)
            elif dim == IMAGE:
                tensor = tensor.narrow(place, span.image, span.images)
            elif dim == SEQ:
                tensor = tensor.narrow(place, span.start, span.length)
            elif dim == KEY:
                first = max(span.key - gone, 0)
                tensor = tensor.narrow(place, first, span.key + span.keys - gone - first)
        return tensor

    def close(self, opened: torch.Tensor) -> torch.Tensor:
        """The user's form of an opened cut; shares memory wherever that is possible."""
        if BATCH_SEQ not in self.leaf.dims:
            return opened
        place = self.leaf.dims.index(BATCH_SEQ)
        return opened.flatten(place, place + 1)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.whole else self.close(self.open(tensor))

    def paste(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Write a cut of the user's form back into `tensor`, in place."""
        if self.whole:
            tensor.copy_(value)
            return
        opened = self.open(tensor)
        opened.copy_(value.reshape(opened.shape))
