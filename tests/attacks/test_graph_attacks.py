"""Graphs small on the wire, and beyond any machine or any patience once they are checked or run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from interpose.errors import BadArgument, InterposeError, InvalidGraph, LimitExceeded, ShapeMismatch
from interpose.graph.limits import Limits
from interpose.graph.manifest import Manifest
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.validate import Report, validate
from interpose.graph.values import Ref, TensorSpec
from interpose.runtime.loading import load
from models import tiny


@cache
def gpt2() -> Manifest:
    return load(tiny("gpt2")).manifest


TRACE = (Run("trace", (Invoke(((1, 2, 3),)),)),)


def check(*nodes: Node, runs: tuple[Run, ...] = TRACE, attached: Any = None) -> Report:
    return validate(Graph(runs, nodes, attached or {}), gpt2(), Limits())


def _views_of_much() -> list[Node]:
    """Each gigabyte looks dead once its one element was looked at, and lives on through that."""
    nodes = []
    for at in range(0, 40, 2):
        nodes += [Node(at, "full", ((2**28,), 1.0)), Node(at + 1, "getitem", (Ref(at), slice(0, 1)))]
    return [*nodes, Node(40, "cat", ([Ref(at) for at in range(1, 40, 2)],)), Node(41, "save", (Ref(40),))]


def _chains_of_views() -> list[Node]:
    nodes = []
    for at in range(0, 60, 3):
        nodes += [Node(at, "full", ((2**28,), 1.0)), Node(at + 1, "getitem", (Ref(at), slice(0, 9)))]
        nodes.append(Node(at + 2, "view", (Ref(at + 1), 3, 3)))
    return [*nodes, Node(60, "stack", ([Ref(at) for at in range(2, 60, 3)],)), Node(61, "save", (Ref(60),))]


def _splits() -> list[Node]:
    return [Node(0, "zeros", (4096,)), *(Node(at, "split", (Ref(0), 1)) for at in range(1, 2000))]


def _ends() -> list[Node]:
    loop = [Node(0, "zeros", (1,)), Node(1, "loop", (1, (Ref(0),)))]
    return loop + [Node(at, "end_loop", (Ref(1), (Ref(0),), None, ())) for at in range(2, 2000)]


def _empty_loops() -> list[Node]:
    """A hundred thousand turns, seven times over, that compute nothing."""
    nodes = [Node(0, "zeros", (1,))]
    for at in range(7):
        nodes.append(Node(at + 1, "loop", (100_000, (Ref(0),)), when=at or None))
    for at in range(7, 0, -1):
        carried = Ref(len(nodes))
        nodes.append(Node(len(nodes), "carry", (0,), when=at))
        nodes.append(Node(len(nodes), "end_loop", (Ref(at), (carried,), None, ()), when=at - 1 or None))
    return [*nodes, Node(len(nodes), "save", (Ref(len(nodes) - 1),))]


def _kept_patterns() -> list[Node]:
    """Reading costs nothing, but what is kept of it would."""
    points = [Point(f"transformer.h.{at % 3}.attn", "pattern") for at in range(60)]
    reads = [Node(at, "read", point=point, invoke=0) for at, point in enumerate(points)]
    return [*reads, Node(60, "cat", ([Ref(at) for at in range(60)],)), Node(61, "amax", (Ref(60),))]


NINES = "9" * 2040
ATTACKS: dict[str, tuple[type[InterposeError], Callable[[], list[Node]]]] = {
    "views of much": (LimitExceeded, _views_of_much),
    "chains of views": (LimitExceeded, _chains_of_views),
    "millions of pieces": (LimitExceeded, _splits),
    "a loop with many ends": (InvalidGraph, _ends),
    "loops of nothing": (LimitExceeded, _empty_loops),
    "broadcast with itself": (BadArgument, lambda: [
        Node(0, "zeros", (1,)), Node(1, "broadcast_tensors", tuple([Ref(0)] * 20_000)),
    ]),
    "dimensions": (BadArgument, lambda: [Node(0, "zeros", (2**62,) * 50_000)]),
    "dimensions of huge sizes": (ShapeMismatch, lambda: [Node(0, "zeros", (2**62,) * 500)]),
    "a size of 2000 digits": (ShapeMismatch, lambda: [
        Node(0, "ones", (1,)), Node(1, "einops_repeat", (Ref(0), f"b -> b {NINES}")), Node(2, "save", (Ref(1),)),
    ]),
    "figures nobody can print": (LimitExceeded, lambda: [Node(0, "zeros", (2**62,) * 64)]),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_from_shapes_alone_and_soon(name: str) -> None:
    error, make = ATTACKS[name]
    nodes, start = make(), time.process_time()
    with pytest.raises(error):
        check(*nodes)
    assert time.process_time() - start < 5


def test_attachments_nobody_uses_count() -> None:
    attached = {f"{at:064x}": TensorSpec((2**28,), "float32") for at in range(20)}
    with pytest.raises(LimitExceeded) as caught:
        check(Node(0, "zeros", (1,)), Node(1, "save", (Ref(0),)), attached=attached)
    assert caught.value.details["limit"] == "memory_bytes"


def test_new_tokens_count_for_every_row() -> None:
    wide = Run("generate", (Invoke(((1,),) * 4096),), {"max_new_tokens": 100})
    with pytest.raises(LimitExceeded) as caught:
        check(Node(0, "tokens"), Node(1, "save", (Ref(0),)), runs=(wide,))
    assert caught.value.details["limit"] == "tokens"


def test_what_is_read_and_kept_counts() -> None:
    run = Run("trace", (Invoke(((1,) * 100,) * 100),))
    taken = check(*_kept_patterns(), Node(62, "save", (Ref(61),)), runs=(run,)).footprint
    assert taken.memory_bytes >= 2 * 60 * (100 * 4 * 100 * 100 * 4) > taken.result_bytes


def test_plain_values_in_saves_count() -> None:
    saved = check(Node(0, "save", ([1] * 1000,)), Node(1, "save", ("x" * 4000,))).footprint
    assert saved.result_bytes >= 12_000


def test_heavy_graphs_share_no_batch() -> None:
    square = [Node(0, "ones", (4096, 4096)), *(Node(at, "matmul", (Ref(at - 1), Ref(0))) for at in range(1, 9))]
    assert check(*square, Node(9, "save", (Ref(8),))).footprint.exclusive
    assert not check(*square[:3], Node(3, "save", (Ref(2),))).footprint.exclusive
