"""One block of a model, looked around in with its family's entry at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...graph.manifest import Leaf, ModuleInfo, first_input, walk
from ...graph.model import Key, Point
from ...graph.named import Effect, Named, Step, View
from ...graph.values import Ref
from .families import Family


class Refused(Exception):
    """Why a point can't be offered."""


@dataclass(frozen=True)
class Heads:
    """How many heads queries have, keys and values have, and how wide each is."""

    query: int
    key: int
    width: int


@dataclass
class Block:
    """One block while its points are found.

    Attributes:
        path: of the block.
        infos, modules: of the whole model.
        attention: what the manifest says of the inside of attention.
    """

    path: str
    family: Family
    config: Any
    infos: Mapping[str, ModuleInfo]
    modules: Mapping[str, nn.Module]
    attention: str
    named: dict[str, Named] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    # -- looking around ----------------------------------------------------------------------------------------

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if name else self.path

    def has(self, name: str) -> bool:
        return bool(name) and self.at(name) in self.infos

    def module(self, name: str) -> nn.Module:
        return self.modules[self.at(name)]

    def first(self, names: tuple[str, ...]) -> str:
        """The first of some modules that is here, or ""."""
        return next((name for name in names if self.has(name)), "")

    def info(self, name: str) -> ModuleInfo:
        if self.at(name) not in self.infos:
            raise Refused(f"its blocks have no module {name!r}")
        return self.infos[self.at(name)]

    def output(self, name: str) -> Point:
        """A module's output, of several the first."""
        info = self.info(name)
        layout = info.points.get("output")
        path: tuple[Key, ...] = (0,) if isinstance(layout, tuple) else ()
        return self.checked(Point(info.path, "output", path))

    def given(self, name: str) -> Point:
        """A module's first input."""
        info = self.info(name)
        path = first_input(info.points.get("inputs"))
        if path is None:
            raise Refused(f"{name or 'the block'} is given no tensor")
        return self.checked(Point(info.path, "inputs", path))

    def leaf(self, point: Point) -> Leaf:
        layout: Any = self.infos[point.module].points.get("inputs" if point.name == "stream" else point.name)
        try:
            found = walk(layout, point.path)
        except KeyError:
            found = None
        if not isinstance(found, Leaf):
            raise Refused(f"{point} is no tensor")
        return found

    def checked(self, point: Point) -> Point:
        """The point. Raises Refused if it is no tensor, or isn't there."""
        self.leaf(point)
        return point

    def tap(self) -> str | None:
        """The module within which attention is computed, if that can be looked into."""
        inside = (path for path in self.infos if path.startswith(self.path + "."))
        return next((path for path in inside if "pattern" in self.infos[path].points), None)

    @property
    def routed(self) -> bool:
        """Whether experts stand in place of this block's MLP."""
        return bool(self.first(self.family.router)) and not self.has(self.family.pre)

    @property
    def parallel(self) -> bool:
        return self.family.parallel(self.config)

    @property
    def heads(self) -> Heads:
        width = self.leaf(self.given(self.family.out)).dims[-1]
        query = figure(self.config, "num_attention_heads", "n_heads", "n_head")
        if query is None or not isinstance(width, int) or width % query:
            raise Refused("its heads can't be told from its config")
        key = figure(self.config, "num_key_value_heads", "num_kv_heads") or query
        if self.family.packing == "falcon":
            key = query if not (self.config.multi_query or self.config.new_decoder_architecture) else key
            key = 1 if self.config.multi_query and not self.config.new_decoder_architecture else key
        return Heads(query, key, width // query)


def figure(config: Any, *names: str) -> int | None:
    """The first of some whole numbers a config has."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def factor(config: Any, name: str) -> float:
    """A factor that a config has by a name; 1 without it."""
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else 1.0


def reading(point: Point, views: tuple[View, ...] = ()) -> Step:
    """The step that reads a point, seen through views."""
    return ("read", point.module, point.name, point.path, views)


def contribution(block: Block, raw: Named, post: str) -> Named:
    """What is added to the residual: a sublayer's result after the norm or factor that follows it."""
    if post:
        return Named(block.output(post))
    scale = factor(block.config, block.family.multiplier)
    if scale == 1.0:
        return raw
    steps: tuple[Step, ...] = (reading(raw.point, raw.views), ("mul", Ref(0), scale))
    change: tuple[Step, ...] = (
        ("sub", Ref(0), Ref(1)),
        ("div", Ref(2), scale),
        reading(raw.point, raw.views),
        ("add", Ref(4), Ref(3)),
    )
    return Named(raw.point, (), steps, (Effect(raw.point, raw.views, change),))
