"""A shard's part of each key-value cache: its own blocks' layers, and the lengths of all others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import InternalError
from ..caches import JOIN, KEEP, join, keep
from .home_caches import ADDRESS, EDITS
from .layers import by_index, grouped, layer_nest, new_cache, new_layer, update
from .route import HOME, CacheRef, Mail, Nest


def _concerned(mail: Sequence[Mail]) -> set[int]:
    """The caches that a visit uses, and those that are joined to them."""
    found = {letter.address[1] for letter in mail}
    news = [entry for letter in mail for entry in letter.value.get("news", ())]
    while news:
        entry = news.pop()
        if entry.get("edit") == JOIN:
            other, before = entry["args"]
            found.add(other)
            news += before
    return found


class ShardCaches:
    """A shard's part of each cache, by number."""

    def __init__(self, site: int, device: torch.device) -> None:
        self._site = site
        self._device = device
        self._caches: dict[int, Any] = {}
        self._foreign: dict[int, set[int]] = {}
        self._told: dict[int, dict[int, Nest]] = {}

    @contextmanager
    def taken(self, mail: Sequence[Mail]) -> Iterator[None]:
        """Caches made, and brought to what other sites say, for one visit.

        If it raises, they are gone: they may hold a part of it, and nobody can tell which.
        """
        try:
            self._take(mail)
            yield
        except BaseException:
            self.drop(_concerned(mail))
            raise

    def _take(self, mail: Sequence[Mail]) -> None:
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
        self._foreign[number] |= update(self._caches[number], groups, self._device)

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
        cache = self._caches[number] = new_cache(word["kind"], self._device)
        cache.layers += [new_layer(nest, self._device) for _, nest in sorted(by_index(word["layers"]).items())]
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
        return {index: layer_nest(layer) for index, layer in layers if index not in foreign}

    def _blank(self, number: int) -> Nest:
        replicated = self._caches[number].layer_class_to_replicate
        return None if replicated is None else layer_nest(replicated())

    def drop(self, numbers: Collection[int]) -> None:
        for number in numbers:
            for kept in (self._caches, self._foreign, self._told):
                kept.pop(number, None)
