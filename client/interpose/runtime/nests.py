"""Reaching into what a module takes and returns: tuples, lists, dicts, the library's output classes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..graph.model import Key


def at(nest: Any, path: Sequence[Key]) -> Any:
    """The part at a path. Raises LookupError where it leads nowhere."""
    for key in path:
        if _indexed(nest, key):
            nest = nest[key]
        elif key in _fields(nest):
            nest = getattr(nest, str(key))
        else:
            raise LookupError(key)
    return nest


def _indexed(nest: Any, key: Key) -> bool:
    return isinstance(nest, Mapping) or (isinstance(nest, (tuple, list)) and type(key) is int)


def _fields(nest: Any) -> set[str]:
    if not dataclasses.is_dataclass(nest) or isinstance(nest, type):
        return set()
    return {field.name for field in dataclasses.fields(nest)}


def put(nest: Any, path: Sequence[Key], value: Any) -> Any:
    """A copy of the nest with one part replaced; the containers along the path are new, the rest is shared."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    part = put(at(nest, (key,)), rest, value)
    if isinstance(nest, tuple):
        items = [*nest]
        items[int(key)] = part
        if hasattr(nest, "n_fields"):
            return type(nest)(items)  # torch's named results, such as topk's
        return type(nest)(*items) if hasattr(nest, "_fields") else tuple(items)
    fresh = copy.copy(nest)
    if isinstance(nest, (list, Mapping)):
        fresh[key] = part
    else:
        setattr(fresh, str(key), part)
    return fresh


def tensors(nest: Any, path: tuple[Key, ...] = ()) -> list[tuple[tuple[Key, ...], torch.Tensor]]:
    """Every tensor of a nest with its path."""
    if isinstance(nest, torch.Tensor):
        return [(path, nest)]
    if isinstance(nest, (tuple, list)):
        return [found for index, item in enumerate(nest) for found in tensors(item, (*path, index))]
    if isinstance(nest, Mapping):
        return [found for key, item in nest.items() for found in tensors(item, (*path, key))]
    return []


def transform(nest: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The nest in plain tuples, lists and dicts with every tensor changed; what is neither nor a scalar is None."""
    if isinstance(nest, torch.Tensor):
        return change(nest)
    if isinstance(nest, list):
        return [transform(item, change) for item in nest]
    if isinstance(nest, tuple):
        return tuple(transform(item, change) for item in nest)
    if isinstance(nest, Mapping):
        return {str(key): transform(item, change) for key, item in nest.items()}
    fields = _fields(nest)
    if fields:
        return {name: transform(getattr(nest, name), change) for name in fields}
    return nest if nest is None or isinstance(nest, (bool, int, float, str)) else None
