"""Key-value caches whose rows come and go: joined by padding on the left, as rows of one batch are.

Only for caches that keep every position of every row. One that slides a window, or keeps a running state without
positions, serves the rows it was begun with to their end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

KEEP, JOIN = "keep", "join"


class Followed(Cache):
    """A cache whose data is elsewhere: whatever is done to it here is done there too, before it is used again."""

    def tell(self, name: str, *args: Any) -> None:
        """Something was done to it: a method of caches, or a function of this file, by its name."""
        raise NotImplementedError


def flexible(cache: Any) -> TypeGuard[DynamicCache]:
    """Whether rows can join and leave a cache."""
    dynamic = type(cache) is DynamicCache or (isinstance(cache, Followed) and isinstance(cache, DynamicCache))
    layers = cache.layers if dynamic else ()
    return bool(layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)


def keep(cache: DynamicCache, rows: Sequence[int], gone: int) -> None:
    """Leave these rows alone, without the first `gone` positions, which hold only their padding."""
    for layer in layers_of(cache):
        layer.keys = _kept(layer.keys, rows, gone)
        layer.values = _kept(layer.values, rows, gone)
    if isinstance(cache, Followed):
        cache.tell(KEEP, [*rows], gone)


def join(cache: DynamicCache, other: DynamicCache) -> None:
    """Put another cache's rows behind these; the shorter of the two is padded on the left."""
    for layer, more in zip(layers_of(cache), layers_of(other), strict=True):
        layer.keys = _joined(layer.keys, more.keys)
        layer.values = _joined(layer.values, more.values)
    if isinstance(cache, Followed):
        cache.tell(JOIN, other)


def padded(value: Tensor, length: int, dim: int) -> Tensor:
    """Zeros before what there is along a dimension, up to a length."""
    missing = length - value.shape[dim]
    return functional.pad(value, (0, 0) * (-1 - dim) + (missing, 0)) if missing else value


def layers_of(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers of a cache that is flexible."""
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def _kept(value: Any, rows: Sequence[int], gone: int) -> Any:
    return value[torch.tensor(list(rows), device=value.device)][:, :, gone:]


def _joined(one: Any, other: Any) -> Tensor:
    length = max(one.shape[-2], other.shape[-2])
    return torch.cat([padded(one, length, -2), padded(other, length, -2)])
