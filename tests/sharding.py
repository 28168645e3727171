"""Tiny models split over shards of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cutting import cut, ranges
from interpose.runtime.feeding import examples
from interpose.runtime.loading import Loaded
from interpose.runtime.pieces import joined
from interpose.runtime.split.calling import answer
from interpose.runtime.split.guest import Exit, Graphs
from interpose.runtime.split.sites import Sites
from interpose.runtime.split.split import Split


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
