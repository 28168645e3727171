"""Graphs checked and compiled once: what is kept serves its like, its owner, and nothing else."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import recording
import torch
from interpose import LanguageModel
from interpose.errors import IndexOutOfRange, InterposeError, InvalidGraph, LimitExceeded
from interpose.graph.limits import UNLIMITED, Limits
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.structure import structure
from interpose.graph.values import Ref, TensorSpec
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.prepared import Preparation
from models import tiny
from recording import Kept

BLOCK = Point("model.layers.1", "output")


@cache
def model() -> Any:
    return LanguageModel(str(tiny("llama")))


def engine() -> Engine:
    model().manifest  # noqa: B018 - it is loaded then
    return Engine(model()._access.local.loaded)


def scaled(by: Any, rows: tuple[tuple[int, ...], ...] = ((5, 6, 7),), at: Any = -1) -> Graph:
    nodes = (
        Node(0, "read", point=BLOCK, invoke=0),
        Node(1, "getitem", (Ref(0), (slice(None), at)), invoke=0),
        Node(2, "mul", (Ref(1), by), invoke=0),
        Node(3, "save", (Ref(2),), invoke=0),
    )
    return Graph((Run("trace", (Invoke(rows),)),), nodes)


def steered(name: str, other: str = "", rows: tuple[tuple[int, ...], ...] = ((5, 6, 7),)) -> Graph:
    """A block's output plus one attached vector, minus another if there is one."""
    spec = TensorSpec((64,), "float32")
    names = [name, *([other] if other else [])]
    nodes = [Node(0, "read", point=BLOCK, invoke=0)]
    nodes += [Node(1 + at, "attachment", (one,)) for at, one in enumerate(names)]
    nodes.append(Node(len(nodes), "add", (Ref(0), Ref(1)), invoke=0))
    if other:
        nodes.append(Node(len(nodes), "sub", (Ref(len(nodes) - 1), Ref(2)), invoke=0))
    nodes.append(Node(len(nodes), "save", (Ref(len(nodes) - 1),), invoke=0))
    return Graph((Run("trace", (Invoke(rows),)),), tuple(nodes), dict.fromkeys(names, spec))


def value(on: Engine, graph: Graph, attachments: dict[str, torch.Tensor] | None = None, **options: Any) -> Any:
    sink = Kept()
    (error,) = on.run([EngineJob(graph, attachments or {}, sink, **options)])
    if error is not None:
        raise error
    (found,) = sink.values.values()
    return found


def test_the_same_structure_with_other_prompts_is_prepared_once() -> None:
    prepare = Preparation(model().manifest)
    one, other = scaled(2.0), scaled(2.0, ((9, 8, 4),))
    first = prepare(one, {}, UNLIMITED, "ada", None)
    second = prepare(other, {}, UNLIMITED, "ada", None)
    assert second.report is first.report
    assert second.plan.graph.nodes is first.plan.graph.nodes
    assert second.plan.graph.runs == other.runs
    assert first.plan.graph.runs == one.runs


def test_what_is_kept_gives_each_its_own_numbers() -> None:
    on = engine()
    for rows in (((5, 6, 7),), ((9, 8, 4),), ((9, 8, 4), (1, 2, 3))):
        found = value(on, scaled(2.0, rows))
        assert torch.equal(found, value(engine(), scaled(2.0, rows)))
        assert found.shape == (len(rows), 64)


def test_attached_values_are_those_of_this_job() -> None:
    on = engine()
    a, b = torch.randn(64), torch.randn(64)
    plain = value(on, scaled(1.0, at=slice(None)))
    assert torch.allclose(value(on, steered("a" * 64), {"a" * 64: a}) - plain, a, atol=1e-4)
    assert torch.allclose(value(on, steered("b" * 64), {"b" * 64: b}) - plain, b, atol=1e-4)
    # The same names the other way round are another order of the same places.
    for first, second, wanted in (("a", "b", a - b), ("b", "a", b - a)):
        graph = steered(first * 64, second * 64)
        found = value(on, graph, {"a" * 64: a, "b" * 64: b})
        assert torch.allclose(found - plain, wanted, atol=1e-4)
    assert torch.allclose(value(on, steered("a" * 64, "a" * 64), {"a" * 64: a}), plain, atol=1e-4)


def test_jobs_of_one_structure_in_one_batch_have_their_own_attachments() -> None:
    on = engine()
    vectors = {letter * 64: torch.randn(64) for letter in "abcdef"}
    sinks = [Kept() for _ in vectors]
    jobs = [EngineJob(steered(n), {n: v}, s) for (n, v), s in zip(vectors.items(), sinks, strict=True)]
    assert on.run(jobs) == [None] * len(jobs)
    plain = value(on, scaled(1.0, at=slice(None)))
    for sink, vector in zip(sinks, vectors.values(), strict=True):
        (found,) = sink.values.values()
        assert torch.allclose(found - plain, vector.expand_as(plain), atol=1e-4)


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), (0.0, -0.0), (2, 3), ((1, 2), [1, 2]), (slice(1, None), slice(True, None))],
)
def test_arguments_that_are_equal_to_python_are_not_the_same(one: Any, other: Any) -> None:
    assert structure(scaled(2.0, at=one)) != structure(scaled(2.0, at=other))
    assert structure(scaled(2.0, at=one)) == structure(scaled(2.0, at=one))


def test_the_sign_of_nothing_is_kept_apart() -> None:
    on = engine()
    ones = [value(on, scaled(by)).sign().mul(value(on, scaled(1.0)).sign()) for by in (2.0, -2.0)]
    assert torch.equal(ones[0], -ones[1])
    negative = [torch.signbit(value(on, scaled(by))) for by in (0.0, -0.0)]
    assert torch.equal(negative[0], ~negative[1])


def test_tokens_are_checked_every_time() -> None:
    on = engine()
    value(on, scaled(2.0))
    with pytest.raises(IndexOutOfRange):
        value(on, scaled(2.0, ((5, 6, 10**6),)))


def test_limits_are_those_of_the_job() -> None:
    on = engine()
    value(on, scaled(2.0))
    with pytest.raises(LimitExceeded):
        value(on, scaled(2.0), limits=Limits(result_bytes=8))


def test_what_is_refused_is_refused_again() -> None:
    on = engine()
    for _ in range(2):
        with pytest.raises(InterposeError):
            value(on, scaled(2.0, at=17))


def test_nothing_found_for_one_owner_serves_another() -> None:
    prepare = Preparation(model().manifest)
    first = prepare(scaled(2.0), {}, UNLIMITED, "ada", None)
    assert prepare(scaled(2.0), {}, UNLIMITED, "bob", None).report is not first.report
    assert prepare(scaled(2.0), {}, UNLIMITED, "ada", None).report is first.report


def test_no_tokens_are_kept_and_no_more_than_allowed() -> None:
    prepare = Preparation(model().manifest, most=10_000)
    for at in range(200):
        prepare(scaled(float(at), ((5, 6, 7),)), {}, UNLIMITED, "", None)
    assert 0 < prepare._weight <= 10_000
    assert all(plan.graph.runs == () for plan, _, _ in prepare._kept.values())
    newest = prepare(scaled(199.0), {}, UNLIMITED, "", None).report
    assert prepare(scaled(199.0), {}, UNLIMITED, "", None).report is newest
    wide = scaled(2.0, at=list(range(3)) * 1000)
    assert prepare(wide, {}, UNLIMITED, "", None).report is not prepare(wide, {}, UNLIMITED, "", None).report


def test_sources_are_kept_apart() -> None:
    def graph(scale: float) -> Graph:
        m = model()
        return recording.recorded(m.trace([5, 6, 7]), lambda _: (m.layers[0].resid_post * scale).save())

    assert structure(graph(1.5)) == structure(graph(1.5))
    assert structure(graph(1.5)) != structure(graph(2.5))


def test_an_attachment_named_by_a_list_is_refused() -> None:
    nodes = (Node(0, "attachment", ([1],)), Node(1, "save", (Ref(0),)))
    graph = Graph((Run("trace", (Invoke(((1, 2, 3),)),)),), nodes)
    with pytest.raises(InvalidGraph, match="attachment"):
        Preparation(engine().manifest)(graph, {}, UNLIMITED, "", None)
