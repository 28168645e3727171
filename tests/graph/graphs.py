"""Random valid graphs on a manifest, and random damage to their plain form."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from interpose.errors import GraphError, Source
from interpose.graph.limits import Limits
from interpose.graph.manifest import Leaf, Manifest
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.validate import Checker
from interpose.graph.values import Ref, TensorSpec
from interpose.runtime.loading import load
from models import tiny
from op_samples import SAMPLES, specs

LIMITS = Limits(nodes=400, rows=64, invokes=16, runs=4, tokens=2048, attachments=64)
OPS = sorted(SAMPLES)
CHAINS: list[tuple[Any, ...]] = [
    (),
    (("getitem", (slice(None), -1)),),
    (("transpose", 0, 1), ("getitem", (0,))),
    (("chunk", 2, -1), ("getitem", 1)),
]


@cache
def gpt2() -> Manifest:
    return load(tiny("gpt2")).manifest


@cache
def places() -> list[tuple[str, str, tuple[Any, ...]]]:
    """Every tensor of every point: module, point, path."""
    return [
        (info.path, name, path)
        for info in gpt2().modules.values()
        for name, layout in info.points.items()
        for path in _paths(layout)
    ]


def _paths(layout: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(layout, Leaf):
        yield ()
    items = enumerate(layout) if isinstance(layout, tuple) else layout.items() if isinstance(layout, dict) else ()
    for key, item in items:
        yield from ((key, *path) for path in _paths(item))


@dataclass
class Builder:
    """Adds nodes at random; those the checker refuses are left out."""

    rng: random.Random
    manifest: Manifest
    runs: list[Run] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    attachments: dict[str, TensorSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = self.rng
        for _ in range(rng.randint(1, 2)):
            invokes = []
            for _ in range(rng.randint(1, 3)):
                rows = tuple(
                    tuple(rng.randrange(400) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 2))
                )
                invokes.append(Invoke(rows, text=("héllo",) * rng.randint(0, 1)))
            self.runs.append(Run("trace", tuple(invokes)))
        self.checker = Checker(self.manifest, self.runs, self.attachments)

    def add(self, op: str, *args: Any, kwargs: Any = None, point: Point | None = None) -> int | None:
        rng = self.rng
        run = rng.randrange(len(self.runs)) if rng.random() < 0.2 else 0
        invoke = rng.choice([None, *range(len(self.runs[run].invokes))])
        source = Source(f"note{rng.randint(0, 2)}.py", rng.randint(1, 99)) if rng.random() < 0.8 else None
        node = Node(len(self.nodes), op, args, kwargs or {}, point, invoke, run, source=source)
        try:
            self.checker.add(node)
        except GraphError:
            return None
        self.nodes.append(node)
        return node.id

    def attach(self, tensor: torch.Tensor) -> Ref:
        key = f"{len(self.attachments):064x}"
        self.attachments[key] = specs(tensor)
        found = self.add("attachment", key)
        assert found is not None
        return Ref(found)

    def attached(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.attach(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.attached(item) for item in value)
        if isinstance(value, slice):
            return slice(*map(self.attached, (value.start, value.stop, value.step)))
        return value

    def point(self) -> Point:
        return Point(*self.rng.choice(places()))

    def ref(self) -> Any:
        return Ref(self.rng.randrange(len(self.nodes))) if self.nodes else 1.5

    def step(self) -> None:
        rng = self.rng
        match rng.randrange(9):
            case 0 | 1:
                self.add("read", point=self.point())
            case 2:
                args, kwargs = rng.choice(SAMPLES[name := rng.choice(OPS)])
                self.add(name, *self.attached(list(args)), kwargs={k: self.attached(v) for k, v in kwargs.items()})
            case 3:
                self.add(
                    rng.choice(["add", "mul", "sub", "maximum"]), self.ref(), rng.choice([self.ref(), 2, -0.5])
                )
            case 4:
                index = rng.choice([..., (slice(None), -1), 0, None, (slice(0, 2, 1), None, ...)])
                self.add("getitem", self.ref(), index)
            case 5:
                index = rng.choice([None, ..., (slice(None), 0)])
                self.add(
                    "write", rng.choice(CHAINS), index, rng.choice([self.ref(), float("inf")]), point=self.point()
                )
            case 6:
                self.add("update", self.ref(), rng.choice(CHAINS), ..., rng.choice([self.ref(), 3]))
            case 7:
                self.add("save", self.ref())
            case _:
                self.add(*rng.choice([("tell", "seen", 1), ("attention_mask",), ("param", "lm_head", "weight")]))


def graph(seed: int, size: int = 12) -> Graph:
    """A graph the checker takes."""
    builder = Builder(random.Random(seed), gpt2())
    for _ in range(size):
        builder.step()
    return Graph(tuple(builder.runs), tuple(builder.nodes), builder.attachments)


def _deep(levels: int) -> Any:
    nest: Any = 1
    for _ in range(levels):
        nest = {"tuple": [nest]} if levels % 2 else [nest]
    return nest


JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 7, 2**20, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64 - 1),
    *(0.5, -0.0, 1e308, 1e-308, float("nan"), float("inf"), "", "x", "x" * 5000, "add", "read", "\ud800", b"bytes"),
    *([], {}, [[]], [1, [2]], [True], [10**6] * 3, list(range(40)), {"": 1}, {1: 2}, {"x": 1, "y": 2}),
    *({"ref": 0}, {"ref": 3}, {"ref": -1}, {"ref": 10**9}, {"ref": True}, {"ref": {"ref": 0}}),
    *({"dtype": "float16"}, {"dtype": "float99"}, {"dtype": []}, {"float": "nan"}, {"float": []}),
    *({"ellipsis": True}, {"slice": [None, 1, None]}, {"slice": [0, 0, 0]}, {"slice": [{"ref": 0}, None, -1]}),
    *({"tuple": []}, {"tuple": [1, {"tuple": [2]}]}, {"tuple": 1}, _deep(9), _deep(10), _deep(40), _deep(41)),
]


def _sites(plain: Any) -> list[tuple[Any, Any]]:
    """Every place of a nest that holds a value."""
    found: list[tuple[Any, Any]] = []
    keys = list(plain) if isinstance(plain, dict) else range(len(plain)) if isinstance(plain, list) else ()
    for key in keys:
        found.append((plain, key))
        found += _sites(plain[key])
    return found


def _given(plain: Any) -> list[Any]:
    nodes = plain.get("nodes") if isinstance(plain, dict) else None
    return [
        node[name]
        for node in (nodes if isinstance(nodes, list) else ())
        if isinstance(node, dict)
        for name in ("args", "kwargs", "point")
        if name in node
    ]


def damaged(plain: Any, rng: random.Random, times: int) -> Any:
    """A copy in which values were replaced, deleted, inserted, doubled or moved."""
    plain = copy.deepcopy(plain)
    for _ in range(times):
        sites = _sites(plain)
        # Most of a graph is ids and sources; what nodes are given is where the variety lies.
        inner = _sites(_given(plain)) if rng.random() < 0.7 else sites
        if not inner:
            break
        home, key = rng.choice(inner)
        other, name = rng.choice(sites)
        value = copy.deepcopy(rng.choice([rng.choice(JUNK), other[name]]))
        match rng.randrange(4):
            case 0 | 1:
                home[key] = value
            case 2:
                del home[key]
            case _ if isinstance(home, list):
                home.insert(key, value)
            case _:
                home[rng.choice(["id", "op", "point", "when", "x", 5, "rows", "step"])] = value
    return plain
