"""Key-value caches of a split model: home's has every length and no data, each shard's has its own layers' data.

A layer is described by what it keeps: numbers as they are, small integer tensors by their numbers, all else by its
shape and dtype. Whatever class of layer it is, it is made again from that elsewhere, with `meta` tensors in the
place of data, so that a read of data that is at another site fails rather than giving numbers.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin

from ...errors import InternalError
from ..caches import JOIN, KEEP, Followed, join, keep
from .route import HOME, CacheRef, Mail, Nest

ADDRESS = "cache"
"""First part of the address of mail about a cache; the second is its number."""

_SMALL = 64
"""Integer tensors of so many elements travel with their numbers."""

_ROOTS = (CacheLayerMixin, LinearAttentionCacheLayerMixin, DummyLayer)


def is_cache(value: Any) -> bool:
    return isinstance(value, Cache)


# -- one layer ---------------------------------------------------------------------------------------------------


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


def _layer(layer: Any) -> Nest:
    return {"class": _named(type(layer)), "state": {name: described(value) for name, value in vars(layer).items()}}


def _write(layer: Any, nest: Nest, device: torch.device) -> None:
    vars(layer).update({name: made(value, device) for name, value in nest["state"].items()})


def _new_layer(nest: Nest, device: torch.device) -> Any:
    cls = _class(nest["class"], _ROOTS)
    layer = cls.__new__(cls)
    _write(layer, nest, device)
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


def _by_index(groups: Nest) -> dict[int, Nest]:
    """The other way."""
    return {index: nest for nest, indices in groups for index in indices}


def _kind(cache: Any) -> Nest:
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


def _new_cache(kind: Nest, device: torch.device) -> Any:
    cls = _class(kind["class"], (Cache,))
    cache: Any = cls.__new__(cls)
    replicated = kind["replicated"]
    vars(cache).update(
        layers=[],
        layer_class_to_replicate=None if replicated is None else _class(replicated, _ROOTS),
        **{name: made(value, device) for name, value in kind["rest"].items()},
    )
    return cache


def _update(cache: Any, groups: Nest, device: torch.device) -> set[int]:
    """Bring layers to what another site says of them; returns which."""
    told = _by_index(groups)
    for index in sorted(told):
        while index >= len(cache.layers):
            cache.layers.append(_filler(cache, told[index], device))
        _write(cache.layers[index], told[index], device)
    return {*told}


def _filler(cache: Any, nest: Nest, device: torch.device) -> Any:
    if cache.layer_class_to_replicate is not None:
        return cache.layer_class_to_replicate()
    return _new_layer(nest, device)


# -- home --------------------------------------------------------------------------------------------------------


EDITS = (
    "reorder_cache",
    "crop",
    "batch_repeat_interleave",
    "batch_select_indices",
    "reset",
    "activate_past_recording",
)
"""Methods by which the library changes a cache between two forwards."""


def _followed(cls: Any, home: HomeCaches) -> Any:
    """The class of a cache of home's: what is done to it is noted for the shards."""

    def following(name: str) -> Callable[..., Any]:
        method = getattr(cls, name)

        @functools.wraps(method)
        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            home.edited(self, name, (*args, *kwargs.values()))  # none of them takes more than one argument
            return result

        return called

    def tell(self: Any, name: str, *args: Any) -> None:
        home.edited(self, name, args)

    methods = {name: following(name) for name in EDITS if hasattr(cls, name)}
    return type(cls.__name__, (Followed, cls), {"__module__": cls.__module__, "tell": tell, **methods})


@dataclass
class _Known:
    """A cache of home's.

    Attributes:
        sites: those that have made theirs.
        seen: what each layer keeps here since a shard last told of it, or somebody changed it in a known way.
        news: site -> what it must be told at its next visit, in order.
        held: caches that were joined to this one, until the shards have done that as well.
    """

    number: int
    kind: Nest
    sites: set[int] = field(default_factory=set)
    seen: list[dict[str, Any]] = field(default_factory=list)
    news: dict[int, list[Nest]] = field(default_factory=dict)
    held: dict[int, Any] = field(default_factory=dict)


class HomeCaches:
    """Home's caches by number. Safe for several forwards at once, each with caches of its own.

    Args:
        dropped: called with the number of a cache that nobody has any more.
    """

    def __init__(self, dropped: Callable[[int], None]) -> None:
        self._dropped = dropped
        self._numbers = itertools.count(1)
        self._known: dict[int, tuple[weakref.ref[Any], _Known]] = {}
        self._classes: dict[type, Any] = {}

    def ref(self, cache: Any) -> CacheRef:
        """What stands for a cache in a block's arguments. Raises InternalError if it was changed here."""
        known = self._find(cache) or self._add(cache)
        if not _same(cache, known.seen):
            raise InternalError("a cache was changed between two forwards in a way that a split model can't follow")
        return CacheRef(known.number)

    def mail(self, caches: Sequence[Any], sites: Sequence[int]) -> list[Mail]:
        """What the sites that are about to be visited must know of these caches."""
        letters = []
        for cache in caches:
            known = self._get(cache)
            for place, site in enumerate(sites):
                word: dict[str, Any] = {"after": [*sites[place + 1 :]], "news": [*known.news.get(site, ())]}
                if site not in known.sites:
                    word |= {"kind": known.kind, "layers": grouped(dict(enumerate(map(_layer, cache.layers))))}
                letters.append(Mail(site, (ADDRESS, known.number), word))
        return letters

    def landed(self, caches: Sequence[Any], mail: Sequence[Mail], device: torch.device) -> None:
        """Take up what the shards say of their layers; those that a forward visited have all said something."""
        for cache in caches:
            known = self._get(cache)
            words = [
                letter.value for letter in mail if letter.to == HOME and letter.address == (ADDRESS, known.number)
            ]
            visited = {word["site"] for word in words}
            known.sites |= visited
            for site in visited:
                known.news.pop(site, None)
            for word in words:
                _update(cache, word["layers"], device)
                if word["layers"]:
                    for site in known.sites - {word["site"]} - (visited & {*word["after"]}):
                        known.news.setdefault(site, []).append({"layers": word["layers"]})
            if not any("edit" in entry for entries in known.news.values() for entry in entries):
                known.held.clear()
            known.seen = [dict(vars(layer)) for layer in cache.layers]

    def edited(self, cache: Any, name: str, args: Sequence[Any]) -> None:
        """A cache was changed here: the shards that have it are to change it likewise."""
        known = self._get(cache)
        if name == JOIN:
            (other,) = args
            more = self._get(other)
            if more.sites != known.sites:
                raise InternalError("two caches that lie on different shards can't be joined")
            known.held[more.number] = other
            for site in known.sites:
                known.news.setdefault(site, []).append(
                    {"edit": JOIN, "args": [more.number, more.news.get(site, [])]}
                )
        else:
            for site in known.sites:
                known.news.setdefault(site, []).append({"edit": name, "args": [*args]})
        known.seen = [dict(vars(layer)) for layer in cache.layers]

    def _find(self, cache: Any) -> _Known | None:
        ref, known = self._known.get(id(cache), (None, None))
        return known if ref is not None and ref() is cache else None

    def _get(self, cache: Any) -> _Known:
        known = self._find(cache)
        if known is None:
            raise InternalError("a cache that no block of a split model was given")
        return known

    def _add(self, cache: Any) -> _Known:
        if any(_data(part) for layer in cache.layers for part in vars(layer).values()):
            raise InternalError("a cache that was filled elsewhere can't be used by a split model")
        known = _Known(next(self._numbers), _kind(cache))
        known.seen = [dict(vars(layer)) for layer in cache.layers]
        kind = type(cache)
        if kind not in self._classes:
            self._classes[kind] = _followed(kind, self)
        cache.__class__ = self._classes[kind]
        self._known[id(cache)] = (weakref.ref(cache), known)
        end = weakref.finalize(cache, self._forget, id(cache), known.number)
        end.atexit = False
        return known

    def _forget(self, key: int, number: int) -> None:
        self._known.pop(key, None)
        self._dropped(number)


def _data(part: Any) -> bool:
    """Whether something that a layer keeps holds numbers, or stands for some."""
    if isinstance(part, Mapping):
        return any(map(_data, part.values()))
    return isinstance(part, Tensor) and part.is_floating_point() and part.numel() > 0


def _same(cache: Any, seen: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the layers keep the very objects they kept, and there is none more or less."""
    return len(cache.layers) == len(seen) and all(
        vars(layer).keys() == before.keys() and all(vars(layer)[name] is value for name, value in before.items())
        for layer, before in zip(cache.layers, seen, strict=True)
    )


# -- a shard -----------------------------------------------------------------------------------------------------


class ShardCaches:
    """A shard's part of each cache, by number."""

    def __init__(self, site: int, device: torch.device) -> None:
        self._site = site
        self._device = device
        self._caches: dict[int, Any] = {}
        self._foreign: dict[int, set[int]] = {}
        self._told: dict[int, dict[int, Nest]] = {}

    def take(self, mail: Sequence[Mail]) -> None:
        """Make caches, and bring them to what other sites say."""
        # Home's words come before those of sites on the way, whichever arrives first.
        for letter in sorted(mail, key=lambda letter: "site" in letter.value):
            number, word = letter.address[1], letter.value
            if "kind" in word:
                self._begin(number, word)
            if "site" in word:
                self._hear(number, word["layers"])
            else:
                self._catch_up(number, word["news"])

    def _hear(self, number: int, groups: Nest) -> None:
        self._foreign[number] |= _update(self._caches[number], groups, self._device)

    def _catch_up(self, number: int, news: Sequence[Nest]) -> None:
        """Do what was done elsewhere since the last visit, in order."""
        if number not in self._caches:
            raise InternalError(f"cache {number} is gone")
        cache = self._caches[number]
        for entry in news:
            if "edit" not in entry:
                self._hear(number, entry["layers"])
            elif entry["edit"] == KEEP:
                keep(cache, *entry["args"])
            elif entry["edit"] == JOIN:
                other, before = entry["args"]
                self._catch_up(other, before)
                join(cache, self._caches[other])
            elif entry["edit"] in EDITS:
                getattr(cache, entry["edit"])(*entry["args"])
            else:
                raise InternalError(f"caches can't {entry['edit']}")

    def _begin(self, number: int, word: Nest) -> None:
        cache = self._caches[number] = _new_cache(word["kind"], self._device)
        cache.layers += [_new_layer(nest, self._device) for _, nest in sorted(_by_index(word["layers"]).items())]
        self._foreign[number] = set()
        self._told[number] = self._states(number)

    def get(self, ref: CacheRef) -> Any:
        return self._caches[ref.number]

    def tell(self, words: Sequence[Mail]) -> list[Mail]:
        """What home, and the sites that come after, must know of the caches that a forward has used."""
        letters = []
        for letter in words:
            if "site" in letter.value:
                continue
            number = letter.address[1]
            states, before = self._states(number), self._told[number]
            blank = self._blank(number)
            changed = {i: nest for i, nest in states.items() if nest != before.get(i, blank)}
            self._told[number] = states
            word = {"site": self._site, "after": letter.value["after"], "layers": grouped(changed)}
            letters += [Mail(to, (ADDRESS, number), word) for to in (HOME, *letter.value["after"])]
        return letters

    def _states(self, number: int) -> dict[int, Nest]:
        foreign = self._foreign[number]
        layers = enumerate(self._caches[number].layers)
        return {index: _layer(layer) for index, layer in layers if index not in foreign}

    def _blank(self, number: int) -> Nest:
        replicated = self._caches[number].layer_class_to_replicate
        return None if replicated is None else _layer(replicated())

    def drop(self, numbers: Collection[int]) -> None:
        for number in numbers:
            for kept in (self._caches, self._foreign, self._told):
                kept.pop(number, None)
