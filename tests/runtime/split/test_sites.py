"""Which site runs which node: where values are made, and no forward comes by more shards than it must."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.runtime.loading import load
from interpose.runtime.plan import compile_graph
from interpose.runtime.split.sites import Division, Sites, divide
from models import tiny

BLOCK = "transformer.h.{}"


@pytest.fixture(scope="module")
def sites() -> Sites:
    manifest = load(tiny("gpt2")).manifest
    return Sites({path: site for site, path in enumerate(manifest.blocks, 1)}, manifest)


def divided(sites: Sites, *nodes: Node, runs: int = 1) -> Division:
    run = Run("trace", (Invoke(((1, 2, 3),)),))
    return divide(compile_graph(Graph((run,) * runs, nodes)), sites)


def read(number: int, block: int, run: int = 0) -> Node:
    return Node(number, "read", point=Point(BLOCK.format(block), "output"), invoke=0, run=run)


def op(number: int, name: str, *args: object) -> Node:
    return Node(number, name, args, invoke=0)


def where(division: Division) -> Sequence[int]:
    return [division.site[node] for node in sorted(division.site)]


def test_a_save_leaves_from_where_its_value_is_made(sites: Sites) -> None:
    division = divided(sites, read(0, 1), op(1, "tanh", Ref(0)), op(2, "save", Ref(1)))
    assert where(division) == [2, 2, 2]
    assert not division.sent


def test_what_takes_two_values_runs_where_the_later_is(sites: Sites) -> None:
    division = divided(sites, read(0, 2), read(1, 0), op(2, "sub", Ref(0), Ref(1)), op(3, "save", Ref(2)))
    assert where(division) == [3, 1, 3, 3]
    assert division.sent == {1: {1: (3,)}}


def test_the_head_called_on_a_value_is_home_at_the_end(sites: Sites) -> None:
    division = divided(sites, read(0, 0), op(1, "call", "lm_head", Ref(0)), op(2, "save", Ref(1)))
    assert where(division) == [1, 0, 0]
    assert not division.stops


def test_home_has_its_turn_between_shards_where_a_later_write_needs_it(sites: Sites) -> None:
    write = Node(2, "write", ((), ..., Ref(1)), point=Point(BLOCK.format(2), "output"), invoke=0)
    division = divided(sites, read(0, 0), op(1, "call", "transformer.ln_f", Ref(0)), write)
    assert where(division) == [1, 0, 3]
    assert division.stops == {(0, 0, 1)}


def test_a_parameter_is_read_where_it_is_before_any_forward(sites: Sites) -> None:
    weight = Node(0, "param", (BLOCK.format(1) + ".mlp.c_fc", "weight"))
    division = divided(sites, weight, op(1, "sum", Ref(0)), op(2, "save", Ref(1)))
    assert where(division) == [2, 2, 2]
    assert division.first == {2}


def test_values_of_two_runs_meet_at_home(sites: Sites) -> None:
    nodes = read(0, 2), read(1, 0, run=1), op(2, "sub", Ref(0), Ref(1)), op(3, "save", Ref(2))
    assert where(divided(sites, *nodes, runs=2)) == [3, 1, 0, 0]


def test_a_later_run_takes_what_an_earlier_one_made_further_on(sites: Sites) -> None:
    write = Node(1, "write", ((), ..., Ref(0)), point=Point(BLOCK.format(0), "output"), invoke=0, run=1)
    division = divided(sites, read(0, 2), write, read(2, 0, run=1), op(3, "save", Ref(2)), runs=2)
    assert where(division) == [3, 1, 1, 1]
    assert division.sent == {3: {0: (1,)}}


def test_home_is_before_between_and_behind_the_shards(sites: Sites) -> None:
    positions = [
        sites.position(Node(0, "read", point=Point(module, "output")))
        for module in ("transformer.wte", BLOCK.format(0), BLOCK.format(2) + ".mlp", "transformer.ln_f", "lm_head")
    ]
    assert positions == [1, 2, 6, 7, 7]
