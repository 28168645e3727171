"""Saving many hook points at once, by pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnknownPoint
from . import standard

if TYPE_CHECKING:
    from .tracer import Model


class Cache(dict[str, Any]):
    """Saved values by the name of their hook point, in the order of the model."""


def collect(model: Model, patterns: Sequence[Any]) -> Cache:
    """Save every hook point that matches one of the patterns. Raises UnknownPoint if one matches nothing."""
    from .handles import Module

    cache = Cache()
    for pattern in patterns:
        names = [f"{pattern._path}.output"] if isinstance(pattern, Module) else list(_matching(model, pattern))
        if not names:
            raise UnknownPoint(f"no hook point matches {pattern!r}; one is named like transformer.h.0.output")
        for name in names:
            path, _, point = name.rpartition(".")
            if name not in cache:
                place = standard.find(model._tree(), "", name)
                module, point = (Module(model, ""), name) if place is not None else (Module(model, path), point)
                cache[name] = module.points[point].save()
    return cache


def _matching(model: Model, pattern: str) -> Iterator[str]:
    wanted = pattern.split(".")
    tree = model._tree()
    own = (".".join(filter(None, (path, point))) for path, info in tree.modules.items() for point in info.points)
    for name in (*own, *standard.every(tree)):
        parts = name.split(".")
        if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            yield name
