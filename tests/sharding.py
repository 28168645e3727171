"""Tiny models split over shards of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cutting import cut, ranges
from interpose.runtime.feeding import examples
from interpose.runtime.loading import Loaded
from interpose.runtime.pieces import joined
from interpose.runtime.split.building import blocks_of
from interpose.runtime.split.calling import answer
from interpose.runtime.split.guest import Exit, Graphs
from interpose.runtime.split.route import Nest
from interpose.runtime.split.sites import Sites, Split
from interpose_server.shards.assembly import put_together
from interpose_server.shards.loaded_shard import load_shard
from route_here import Here


def split(loaded: Loaded, parts: int, leaving: Callable[[int], Exit | None] = lambda site: None) -> Loaded:
    """Home of a loaded model, its blocks on so many shards; `leaving`: how saves leave each."""
    shards = ranges(loaded.manifest.blocks, parts)
    sites = Sites({path: site for site, paths in enumerate(shards, 1) for path in paths}, loaded.manifest)

    def guest(site: int, part: Any) -> Graphs:
        return Graphs(_seen(loaded, part), sites, site, leaving(site))

    made = cut(loaded.model, shards, guest)
    home = replace(_seen(loaded, made.home), split=Split(made.route, sites))
    inputs = joined([examples(home.model, home.feeding, [5])], home.feeding.inputs, home.device)
    home.model(**home.feeding.kwargs(inputs))  # shows what blocks return
    answer(home)
    return home


def _seen(loaded: Loaded, model: Any) -> Loaded:
    modules = dict(model.named_modules())
    return replace(loaded, model=model, modules=modules, names={module: path for path, module in modules.items()})


class _InTurn(Here):
    """Errands one by one: what loads a model isn't made for several threads of one process."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._turn = threading.RLock()

    def errand(self, site: int, name: str, request: Nest) -> Nest:
        with self._turn:
            return super().errand(site, name, request)


def assembled(source: Path, parts: int, adapters: Mapping[str, Path] | None = None) -> Loaded:
    """A model that is loaded and measured by parts, as in a cluster; its shards are threads of this process."""
    groups = ranges(blocks_of(source), parts)
    blocks = [path for own in groups for path in own]
    stations = {
        site: load_shard(site, str(source), own, blocks, device="cpu") for site, own in enumerate(groups, 1)
    }
    route = _InTurn({path: site for site, own in enumerate(groups, 1) for path in own}, stations)
    told = {name: str(folder) for name, folder in (adapters or {}).items()}
    return put_together(source.name, str(source), route, told, revision=None, device="cpu")
