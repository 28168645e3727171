"""A whole model cut into home and shards within one process; they share its parameters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from interpose.runtime.blocklists import main_list
from interpose.runtime.split.route import Guest, Route
from interpose.runtime.split.shard import Shard
from interpose.runtime.split.stubs import Dispatcher, places, settle_exit, stub
from route_here import Here
from torch import nn


@dataclass(frozen=True, eq=False)
class Cut:
    """A model in parts.

    Attributes:
        home: the model with stubs.
        parts: of each shard, the model with its own blocks alone; the others pass their hidden states on.
    """

    home: nn.Module
    parts: tuple[nn.Module, ...]
    route: Here
    dispatcher: Dispatcher


def block_ranges(model: nn.Module, shards: int) -> list[list[str]]:
    """Paths of a model's blocks, so many ranges of about one length."""
    found = main_list(model)
    assert found is not None, "it has no list of blocks"
    return ranges(found.blocks, shards)


def ranges(paths: Sequence[str], parts: int) -> list[list[str]]:
    """Consecutive paths in so many parts of about one length."""
    edges = [round(index * len(paths) / parts) for index in range(parts + 1)]
    return [[*paths[start:end]] for start, end in itertools.pairwise(edges)]


def cut(
    model: nn.Module,
    shards: Sequence[Sequence[str]],
    guest: Callable[[int, nn.Module], Guest | None] = lambda site, part: None,
) -> Cut:
    """Args: shards: of each, the paths of its blocks; guest: what of the jobs' graphs runs on a site's part."""
    parts = parts_of(model, shards)
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    stations = {
        site: Shard(site, {path: part.get_submodule(path) for path in paths}, device, guest(site, part))
        for site, (paths, part) in enumerate(zip(shards, parts, strict=True), 1)
    }
    route = Here({path: site for site, paths in enumerate(shards, 1) for path in paths}, stations)
    home, dispatcher = home_of(model, route)
    return Cut(home, parts, route, dispatcher)


def parts_of(model: nn.Module, shards: Sequence[Sequence[str]]) -> tuple[nn.Module, ...]:
    """Of each shard, the model with its own blocks alone."""
    blocks = {path for paths in shards for path in paths}
    return tuple(_copied(model, {path: nn.Identity() for path in blocks - {*own}}) for own in shards)


def home_of(model: nn.Module, route: Route) -> tuple[nn.Module, Dispatcher]:
    """The model with stubs where the blocks were that a route leads to; `model` stays as it is."""
    blocks = {path: model.get_submodule(path) for path in route.sites}
    dispatcher = Dispatcher(route, blocks)
    where = places(route, blocks)
    home = _copied(model, {path: stub(block, dispatcher, where[path]) for path, block in blocks.items()})
    settle_exit(home)
    return home, dispatcher


def _copied(model: nn.Module, instead: dict[str, nn.Module]) -> nn.Module:
    """The model again with other modules in some places; parameters are the same ones."""
    memo: dict[int, object] = {id(param): param for param in model.parameters()}
    memo |= {id(model.get_submodule(path)): module for path, module in instead.items()}
    return copy.deepcopy(model, memo)
