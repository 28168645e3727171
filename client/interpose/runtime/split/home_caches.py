"""Key-value caches at a split model's home: they have every length and no data, which lies on the shards.

What is done to one here, rows that come and go, beams, cropping, is done on every shard before it is used again.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ...errors import InternalError
from ..caches import JOIN, Followed
from .layers import grouped, kind_of, layer_nest, update
from .route import HOME, CacheRef, Mail, Nest

ADDRESS = "cache"
"""First part of the address of mail about a cache; the second is its number."""

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


def is_cache(value: Any) -> bool:
    """Whether a block's argument is a key-value cache."""
    return isinstance(value, Cache)


@dataclass
class _Known:
    """A cache of home's.

    Attributes:
        sites: those that have made theirs.
        seen: what each layer keeps here since a shard last told of it, or somebody changed it in a known way.
        news: site -> what it must be told at its next visit, in order.
        held: caches that were joined to this one, until the shards have done that as well.
        spoiled: whether a forward failed with it: some shards had gone on with theirs, and others hadn't.
    """

    number: int
    kind: Nest
    sites: set[int] = field(default_factory=set)
    seen: list[dict[str, Any]] = field(default_factory=list)
    news: dict[int, list[Nest]] = field(default_factory=dict)
    held: dict[int, Any] = field(default_factory=dict)
    spoiled: bool = False


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
        """What stands for a cache in a block's arguments.

        Raises InternalError if it was changed here, or a forward has failed with it.
        """
        known = self._find(cache) or self._add(cache)
        if known.spoiled:
            raise InternalError("a forward has failed with this cache, which no shard has any more")
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
                    word |= {"kind": known.kind, "layers": grouped(dict(enumerate(map(layer_nest, cache.layers))))}
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
                update(cache, word["layers"], device)
                if word["layers"]:
                    for site in known.sites - {word["site"]} - (visited & {*word["after"]}):
                        known.news.setdefault(site, []).append({"layers": word["layers"]})
            if not any("edit" in entry for entries in known.news.values() for entry in entries):
                known.held.clear()
            known.seen = [dict(vars(layer)) for layer in cache.layers]

    def spoiled(self, caches: Sequence[Any]) -> None:
        """A forward failed on its way by the shards: they let go of the caches that it was to use."""
        for cache in caches:
            known = self._get(cache)
            for one in (known, *map(self._get, known.held.values())):
                one.spoiled = True
                self._dropped(one.number)

    def edited(self, cache: Any, name: str, args: Sequence[Any]) -> None:
        """A cache was changed here: the shards that have it are to change it likewise."""
        known = self._get(cache)
        more: _Known | None = None
        if name == JOIN:
            (other,) = args
            more = self._get(other)
            if more.sites != known.sites:
                raise InternalError("two caches that lie on different shards can't be joined")
            known.held[more.number] = other
        for site in known.sites:
            told = [more.number, more.news.get(site, [])] if more is not None else [*args]
            known.news.setdefault(site, []).append({"edit": name, "args": told})
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
        known = _Known(next(self._numbers), kind_of(cache))
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
