"""Nests on their way between sites: what of them is sent along, and put in place of it at the other end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .route import Mail, Nest


def mapped(nest: Nest, change: Callable[[Any], Any]) -> Nest:
    """The nest with everything in it that isn't a tuple, a list or a dict changed."""
    if type(nest) is tuple:
        return tuple(mapped(item, change) for item in nest)
    if type(nest) is list:
        return [mapped(item, change) for item in nest]
    if type(nest) is dict:
        return {key: mapped(item, change) for key, item in nest.items()}
    return change(nest)


class Swapped:
    """A change of tensors by which the same tensor becomes the same other one wherever it stands."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change = change
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # Kept with what it stands for, whose id would otherwise be given to another.
        if id(value) not in self._known:
            self._known[id(value)] = (value, self._change(value))
        return self._known[id(value)][1]


def leaf(tensor: Tensor) -> Tensor:
    """The same numbers where another site's part of the graph begins, in memory of their own."""
    with torch.no_grad():
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The same leaf on a device; itself if it is there."""
    if tensor.device == device or tensor.is_meta:
        return tensor
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def readdressed(mail: Sequence[Mail], change: Callable[[Any], Any]) -> list[Mail]:
    """Mail whose values are changed."""
    return [Mail(letter.to, letter.address, mapped(letter.value, change)) for letter in mail]
