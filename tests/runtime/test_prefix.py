"""Runs with first tokens in common: these are computed once, and each run gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpose import LanguageModel
from interpose.errors import GraphError
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.validate import Checker
from interpose.graph.values import Ref
from interpose.runtime.engine import Engine
from interpose.runtime.plan import compile_graph
from models import ARCHITECTURES, tiny
from recording import recorded
from sessions import called, part, session
from test_engine_isolation import close, common, engine, points, precise, run, save

SLIDING = {"mistral", "gemma2", "gemma3"}
BEHIND = sorted({*ARCHITECTURES} - SLIDING - {"bert", "mamba"})
"""Architectures whose cache keeps every position."""


@contextmanager
def tokens(on: Engine) -> Iterator[list[tuple[int, ...]]]:
    """[rows, positions] of what the embedding is given."""
    shapes: list[tuple[int, ...]] = []
    module = on.loaded.modules[on.manifest.roles["embed"]]
    with called([module], lambda _, ids: shapes.append(tuple(ids.shape))):
        yield shapes


def late_job(seed: int, on: Engine, places: Sequence[Point], row: Sequence[int], clear: int) -> Graph:
    """A random job that writes behind a row's first tokens alone, and reads anything."""
    rng = random.Random(seed)
    checker, nodes = Checker(on.manifest, [Run("trace", (Invoke((tuple(row),)),))], {}), []

    def add(op: str, *args: Any, point: Point | None = None) -> int | None:
        node = Node(len(nodes), op, args, point=point, invoke=0)
        try:
            checker.add(node)
        except GraphError:
            return None
        nodes.append(node)
        return node.id

    for _ in range(rng.choice([1, 3, 6])):
        point, position = rng.choice(places), rng.randrange(clear, len(row))
        if rng.random() < 0.5:
            index = (slice(None), rng.choice([position, position - len(row), slice(position, None)]))
            add("write", (), index, rng.choice([0.25, -1.5]), point=point)
        read = add("read", point=rng.choice(places))
        if read is not None:
            add("save", Ref(read))
    logits = add("read", point=Point("", "output", ("logits",)))
    last = add("getitem", Ref(logits), (slice(None), -1))
    add("save", Ref(last))
    return Graph((Run("trace", (Invoke((tuple(row),)),)),), tuple(nodes))


def divisible(on: Engine) -> list[Point]:
    """Points whose values can be put together of two parts of their positions."""

    def whole(point: Point) -> bool:
        job = Graph((Run("trace", (Invoke(((1, 2, 3),)),)),), (Node(0, "read", point=point, invoke=0), save(1, 0)))
        return on._prefix.clear(compile_graph(job), 0) > 0

    return [point for point in points(on.manifest) if whole(point)]


def behind_as_alone(arch: str, seed: int) -> None:
    on = engine(arch)
    rng = random.Random(seed)
    common_tokens = [rng.randrange(5, 300) for _ in range(rng.choice([3, 4, 9]))]
    clear = len(common_tokens)
    rows = [[*common_tokens, *(rng.randrange(5, 300) for _ in range(rng.choice([1, 2, 5])))] for _ in range(3)]
    twin = precise(arch)
    shared = common(on.manifest, twin.manifest)
    places = [point for point in divisible(on) if point in shared]
    graphs = [late_job(seed + number, on, places, rng.choice(rows), clear) for number in range(2 + seed % 7)]
    whole, begins = session(graphs)
    other, _ = session([late_job(seed + 50 + number, on, places, rows[0], clear) for number in range(3)])
    together, _ = run(on, [whole, other])
    for graph, begin in zip(graphs, begins, strict=True):
        close(part(together, begin, graph), run(on, [graph])[0], run(twin, [graph])[0])


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_runs_behind_common_tokens_get_what_each_gets_alone(arch: str, seed: int) -> None:
    behind_as_alone(arch, seed)


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("arch", BEHIND)
def test_behind_common_tokens_on_every_architecture(arch: str) -> None:
    for seed in (1, 40, 900):
        behind_as_alone(arch, seed)


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize("arch", BEHIND)
def test_common_tokens_are_computed_once(arch: str) -> None:
    on = engine(arch)
    nested = isinstance(on.manifest.modules[on.manifest.blocks[0]].points["output"], tuple)
    point = Point(on.manifest.blocks[0], "output", (0,) if nested else ())
    first = tuple(range(5, 45))

    def steered(number: int) -> Graph:
        """It writes at the last position of a prompt of its own, and reads a position that all have in common."""
        asked = Run("trace", (Invoke(((*first, 50 + number, 7),)),))
        nodes = (
            Node(0, "write", ((), (slice(None), -1), 0.5 + number), point=point, invoke=0),
            Node(1, "read", point=replace(point, module=on.manifest.blocks[-1]), invoke=0),
            save(2, 1),
            Node(3, "read", point=Point("", "output", ("logits",)), invoke=0),
            Node(4, "getitem", (Ref(3), (slice(None), -1)), invoke=0),
            save(5, 4),
        )
        return Graph((asked,), nodes)

    graphs = [steered(number) for number in range(6)]
    whole, begins = session(graphs)
    run(on, [whole])
    with tokens(on) as shapes:
        (together,) = run(on, [whole])
    assert shapes == [(1, 42), (6, 2)]
    found = [part(together, begin, graph) for begin, graph in zip(begins, graphs, strict=True)]
    for kept, graph in zip(found, graphs, strict=True):
        close(kept, run(on, [graph])[0])
        assert kept.values[2][0].shape[1] == 42
    assert not torch.equal(found[0].values[5][0], found[1].values[5][0])


@pytest.mark.usefixtures("eager_cuts")
@pytest.mark.parametrize(
    "index",
    [..., (slice(None), 0), (slice(None), slice(None, -1)), (slice(None), slice(None, None, 20)), (0,)],
)
def test_who_writes_among_the_first_tokens_runs_whole(index: Any) -> None:
    on = engine("llama")
    row = tuple(range(5, 45))

    def written(value: float) -> Graph:
        nodes = (
            Node(0, "write", ((), index, value), point=Point(on.manifest.blocks[0], "output"), invoke=0),
            Node(1, "read", point=Point("", "output", ("logits",)), invoke=0),
            Node(2, "getitem", (Ref(1), (slice(None), -1)), invoke=0),
            save(3, 2),
        )
        return Graph((Run("trace", (Invoke((row,)),)),), nodes)

    graphs = [written(value) for value in (0.5, 1.5, -2.0)]
    whole, begins = session(graphs)
    (together,) = run(on, [whole])
    for graph, begin in zip(graphs, begins, strict=True):
        close(part(together, begin, graph), run(on, [graph])[0])
    with tokens(on) as shapes:
        run(on, [whole])
    assert all(width == len(row) for _, width in shapes)


@pytest.mark.usefixtures("eager_cuts")
def test_runs_of_the_same_rows_in_other_invokes_share_them() -> None:
    on = engine("llama")
    first = tuple(range(5, 45))
    point = Point(on.manifest.blocks[-1], "output")

    def reads(*invokes: Invoke) -> Graph:
        last = len(invokes) - 1
        return Graph((Run("trace", invokes),), (Node(0, "read", point=point, invoke=last), save(1, 0)))

    def steered(number: int) -> Graph:
        asked = Run("trace", (Invoke(tuple((*first, 50 + number + row, 7) for row in range(2))),))
        write = Node(0, "write", ((), (slice(None), -1), 0.5), point=replace(point, module=on.manifest.blocks[0]))
        return Graph((asked,), (replace(write, invoke=0), Node(1, "read", point=point, invoke=0), save(2, 1)))

    rows = (*first, 3, 4), (*first, 8, 9)
    both, apart = reads(Invoke(rows)), reads(Invoke(rows[:1]), Invoke(rows[1:]))
    graphs = [apart, both, *map(steered, range(3))]
    whole, begins = session(graphs)
    with tokens(on) as shapes:
        (together,) = run(on, [whole])
    assert (6, 2) in shapes
    for graph, begin in zip(graphs, begins, strict=True):
        close(part(together, begin, graph), run(on, [graph])[0])


@pytest.mark.parametrize("arch", sorted({*ARCHITECTURES} - {*BEHIND}))
def test_models_that_look_ahead_or_forget_begin_at_the_first_token(arch: str) -> None:
    assert not engine(arch)._prefix.works


@pytest.mark.usefixtures("eager_cuts")
def test_what_is_written_in_place_at_late_positions_leaves_the_first_alone() -> None:
    lm: Any = LanguageModel(str(tiny("llama")))
    row = list(range(5, 45))

    def fill(_: Any) -> None:
        for scale in (0.5, 2.0, -1.0):
            with lm.trace(row):
                lm.layers[0].resid_post[:, -1] *= scale
                lm.layers[1].resid_post[:, -3:] += scale
                lm.output[:, -1].save()

    whole = recorded(lm.session(), fill)
    on = engine("llama")
    (expected,) = run(on, [whole], exclusive=True)
    run(on, [whole])
    with tokens(on) as shapes:
        (together,) = run(on, [whole])
    assert shapes == [(1, 40), (3, 3)]
    close(together, expected)
