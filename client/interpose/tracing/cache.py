"""Saving many hook points at once, by pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnknownPoint

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
                cache[name] = Module(model, path).points[point].save()
    return cache


def _matching(model: Model, pattern: str) -> Iterator[str]:
    wanted = pattern.split(".")
    for path, info in model._tree().modules.items():
        for point in info.points:
            parts = [*filter(None, path.split(".")), point]
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                yield ".".join(parts)
