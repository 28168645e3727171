"""Home and parts of a model that is loaded by parts: each process reads only what it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import ConfigError
from ..blocklists import main_list
from ..partial_loading import empty, inside, load_part, outline, outside
from ..sources import Source
from .route import Route
from .stubs import Dispatcher, places, settle_exit, stub


def blocks_of(source: str | Path, revision: str | None = None) -> tuple[str, ...]:
    """Paths of the blocks of a model's largest list, told without its weights.

    Raises:
        ConfigError: it has none, or the library can't make it.
        ModelUnavailable: the hub doesn't give it.
    """
    at = Source.of(source, revision)
    found = main_list(outline(at.config()))
    if found is None:
        raise ConfigError(f"{at.place} has no list of blocks, so it can't be split")
    return found.blocks


def commit_of(source: str | Path, revision: str | None = None) -> str | None:
    """The hub's commit that a revision, or none, stands for now; None for a folder.

    All parts of a model are to be read from one. Raises as `blocks_of`.
    """
    at = Source.of(source, revision)
    found: str | None = at.fixed(at.config()).hub.get("revision")
    return found


def load_home(source: str | Path, route: Route, **options: Any) -> tuple[nn.Module, Dispatcher]:
    """A model without its blocks, stubs in their place, and what takes their calls. `options` as of `load_part`."""
    model = load_part(source, outside(route.sites), **options)
    return model, stubbed(model, route)


def stubbed(model: nn.Module, route: Route) -> Dispatcher:
    """Put stubs in the place of a model's blocks."""
    blocks = {path: model.get_submodule(path) for path in route.sites}
    dispatcher = Dispatcher(route, blocks)
    where = places(route, blocks)
    _put(model, {path: stub(block, dispatcher, where[path]) for path, block in blocks.items()})
    settle_exit(model)
    return dispatcher


@contextmanager
def unstubbed(model: nn.Module, dispatcher: Dispatcher) -> Iterator[None]:
    """Inside, a model has its whole tree, for those who look at modules and don't run them."""
    stubs = {path: model.get_submodule(path) for path in dispatcher.blocks}
    try:
        _put(model, dispatcher.blocks)
        yield
    finally:
        _put(model, stubs)


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def load_slice(source: str | Path, own: Collection[str], blocks: Sequence[str], **options: Any) -> nn.Module:
    """A model with some of its blocks, and all that is outside the list of them. `options` as of `load_part`."""
    others = outside([path for path in blocks if path not in own])
    model: nn.Module = load_part(source, others, **options)
    return model


def release(model: nn.Module, own: Collection[str]) -> None:
    """Let go of the weights of all but some blocks, once a slice has been measured."""
    within = inside(own)
    for path, module in model.named_modules():
        for name in (*module._parameters, *module._buffers):
            if not within(f"{path}.{name}"):
                empty(module, name)
