"""Kernels that pick and place by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BadArgument


def _plain(item: Any) -> Any:
    """A slice with tensors for ends gets their numbers."""
    if isinstance(item, slice) and any(isinstance(end, Tensor) for end in (item.start, item.stop, item.step)):
        return slice(*(_number(end) for end in (item.start, item.stop, item.step)))
    return item


def _number(end: Any) -> int | None:
    if not isinstance(end, Tensor):
        return None if end is None else int(end)
    if end.numel() != 1 or end.is_floating_point() or end.is_complex():
        raise BadArgument(f"a slice's end is one integer, not a tensor of shape {list(end.shape)}, {end.dtype}")
    return int(end.item())


def getitem(input: Any, index: tuple[Any, ...]) -> Any:
    if isinstance(input, Tensor):
        for item in index:
            if type(item) is slice:
                return input[tuple([_plain(item) for item in index])]
        return input[index]
    if len(index) != 1 or not isinstance(index[0], (int, slice)):
        raise BadArgument("several tensors are indexed by one integer or slice: take a tensor first")
    return input[index[0]]


def assign(target: Tensor, index: tuple[Any, ...], value: Any) -> None:
    """In place; a tensor value takes the target's dtype first, as indexed writes don't convert."""
    if isinstance(value, Tensor) and (value.dtype != target.dtype or value.device != target.device):
        value = value.to(device=target.device, dtype=target.dtype)
    target[tuple([_plain(item) for item in index])] = value


def setitem(input: Tensor, index: tuple[Any, ...], value: Any) -> Tensor:
    result = input.clone()
    assign(result, index, value)
    return result


def copy(input: Tensor, src: Any) -> Tensor:
    result = input.clone()
    return result.copy_(src) if isinstance(src, Tensor) else result.fill_(src)


def rot90(input: Tensor, k: int, dims: tuple[int, ...]) -> Tensor:
    return torch.rot90(input, k, list(dims))
