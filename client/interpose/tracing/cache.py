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
        names = {f"{pattern._path}.output": (pattern._path, "output")} if isinstance(pattern, Module) else {}
        names = names or dict(_matching(model, pattern))
        if not names:
            raise UnknownPoint(f"no hook point matches {pattern!r}; one is named like transformer.h.0.output")
        for name, (path, point) in names.items():
            if name not in cache:
                cache[name] = Module(model, path).points[point].save()
    return cache


def _matching(model: Model, pattern: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names that match, each with its module's path and the point's name there."""
    wanted = pattern.split(".")
    tree = model._tree()
    own = ((path, point) for path, info in tree.modules.items() for point in info.points)
    for path, point in (*own, *(("", name) for name in standard.every(tree))):
        name = f"{path}.{point}" if path else point
        parts = name.split(".")
        if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            yield name, (path, point)
