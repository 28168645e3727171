"""What a cache keeps, told without its data.

Numbers are told as they are, small integer tensors by their numbers, all else by its shape and dtype. Whatever
class of layer it is, it is made again from that elsewhere, with `meta` tensors in the place of data, so that a read
of data that is at another site fails rather than giving numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin

from ...errors import InternalError
from .route import Nest

_SMALL = 64
"""Integer tensors of so many elements travel with their numbers."""

_ROOTS = (CacheLayerMixin, LinearAttentionCacheLayerMixin, DummyLayer)


def described(value: Any) -> Nest:
    """What a layer keeps, without its data. Raises InternalError for what can't be told elsewhere."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        small = value.numel() <= _SMALL and not value.is_floating_point() and not value.is_meta
        return {
            "t": "numbers" if small else "shape",
            "dtype": dtype,
            "v": value.tolist() if small else [*value.shape],
        }
    if isinstance(value, torch.dtype):
        return {"t": "dtype", "v": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"t": "device"}
    if isinstance(value, Mapping):
        return {"t": "map", "v": [[described(key), described(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"t": type(value).__name__, "v": [described(item) for item in value]}
    raise InternalError(f"a cache that keeps a {type(value).__name__} can't be split over sites")


def made(nest: Nest, device: torch.device) -> Any:
    """The other way; data is of shape and dtype alone."""
    if not isinstance(nest, Mapping):
        return nest
    kind: str = nest["t"]
    value: Any = nest.get("v")
    if kind == "numbers":
        return torch.tensor(value, dtype=getattr(torch, nest["dtype"]), device=device)
    if kind == "shape":
        return torch.empty(value, dtype=getattr(torch, nest["dtype"]), device="meta")
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "device":
        return device
    if kind == "map":
        return {made(key, device): made(item, device) for key, item in value}
    items = [made(item, device) for item in value]
    return tuple(items) if kind == "tuple" else items


def _named(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _class(name: str, roots: Sequence[Any]) -> Any:
    """A class of the library's by its name: nothing else is made of what a site is told."""
    found = [*roots]
    for cls in found:
        found += [below for below in cls.__subclasses__() if below not in found]
    for cls in found:
        if _named(cls) == name and cls.__module__.startswith("transformers."):
            return cls
    raise InternalError(f"no cache of class {name}")


def layer_nest(layer: Any) -> Nest:
    """A layer's class and all that it keeps, data by shape and dtype alone."""
    return {"class": _named(type(layer)), "state": {name: described(value) for name, value in vars(layer).items()}}


def _write(layers: Sequence[Any], nest: Nest, device: torch.device) -> None:
    """Have layers keep what is told."""
    state = nest["state"]
    alike = {name: made(value, device) for name, value in state.items() if _fixed(value)}
    for layer in layers:
        vars(layer).update(alike)
        vars(layer).update({name: made(value, device) for name, value in state.items() if name not in alike})


def _fixed(nest: Nest) -> bool:
    """Whether nobody changes it in place, so that layers can share it."""
    return not isinstance(nest, Mapping) or nest["t"] in ("shape", "dtype", "device")


def new_layer(nest: Nest, device: torch.device) -> Any:
    """A layer of such a description. Raises InternalError for a class that isn't the library's."""
    cls = _class(nest["class"], _ROOTS)
    layer = cls.__new__(cls)
    _write([layer], nest, device)
    return layer


# -- all layers of one cache -------------------------------------------------------------------------------------


def grouped(layers: Mapping[int, Nest]) -> Nest:
    """Layers' descriptions, each different one once: `[description, [indices]]`."""
    found: list[list[Any]] = []
    for index, nest in layers.items():
        for entry in found:
            if entry[0] == nest:
                entry[1].append(index)
                break
        else:
            found.append([nest, [index]])
    return found


def by_index(groups: Nest) -> dict[int, Nest]:
    """The other way."""
    return {index: nest for nest, indices in groups for index in indices}


def kind_of(cache: Any) -> Nest:
    """How an empty cache like this one is made."""
    if isinstance(cache, EncoderDecoderCache) or not type(cache).__module__.startswith("transformers."):
        raise InternalError(f"a cache of class {type(cache).__name__} can't be split over sites")
    replicated = cache.layer_class_to_replicate
    rest = {
        name: value for name, value in vars(cache).items() if name not in ("layers", "layer_class_to_replicate")
    }
    return {
        "class": _named(type(cache)),
        "replicated": None if replicated is None else _named(replicated),
        "rest": {name: described(value) for name, value in rest.items()},
    }


def new_cache(kind: Nest, device: torch.device) -> Any:
    """An empty cache of such a kind. Raises InternalError for a class that isn't the library's."""
    cls = _class(kind["class"], (Cache,))
    cache: Any = cls.__new__(cls)
    replicated = kind["replicated"]
    vars(cache).update(
        layers=[],
        layer_class_to_replicate=None if replicated is None else _class(replicated, _ROOTS),
        **{name: made(value, device) for name, value in kind["rest"].items()},
    )
    return cache


def update(cache: Any, groups: Nest, device: torch.device) -> set[int]:
    """Bring layers to what another site says of them; returns which."""
    told = by_index(groups)
    for index in range(len(cache.layers), max(told, default=-1) + 1):
        cache.layers.append(_filler(cache, told.get(index), device))
    for nest, indices in groups:
        _write([cache.layers[index] for index in indices], nest, device)
    return {*told}


def _filler(cache: Any, nest: Nest, device: torch.device) -> Any:
    """A layer that isn't there yet: most caches have all from the beginning, some make them as they need them."""
    if cache.layer_class_to_replicate is not None:
        return cache.layer_class_to_replicate()
    if nest is None:
        raise InternalError("a cache grew by layers that nobody told of")
    return new_layer(nest, device)
