"""Layers called on values by several jobs of a forward: one product, and nobody could tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import recording
import torch
from interpose.errors import JobCancelled
from interpose.graph.model import Graph
from interpose.runtime import products
from interpose.runtime.engine import EngineJob
from recording import Kept, ran
from recording import opened as model
from sessions import called

ROWS = ([5, 9, 33], [7, 8, 14, 90, 121, 33, 60], [44], [12, 13, 14], [21, 4, 4, 90])
Fill = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def every_layer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LARGE_BYTES", 0)


def recorded(fill: Fill, row: Any, arch: str = "llama") -> Graph:
    return recording.recorded(model(arch).trace(row), lambda tracer: fill(model(arch)))


def lens(m: Any, layer: int, place: Any = slice(None)) -> Any:
    body = body_of(m)
    norm = body.ln_f if hasattr(body, "ln_f") else body.norm
    return m.lm_head(norm(m.layers[layer].resid_post[:, place]))


def embedded(m: Any, tokens: Any) -> Any:
    body = body_of(m)
    return (body.wte if hasattr(body, "wte") else body.embed_tokens)(tokens)


def body_of(m: Any) -> Any:
    return m.transformer if hasattr(m, "transformer") else m.model


def every_layer(m: Any) -> None:
    for layer in range(3):
        lens(m, layer, slice(-1, None)).argmax(-1).save()
        lens(m, layer)[:, -1].topk(4).values.save()


def written(m: Any) -> None:
    """What a later layer is given comes from a call: it can't wait."""
    chosen = lens(m, 0).argmax(-1)
    m.layers[2].resid_pre[:] = embedded(m, chosen)
    lens(m, 2).save()


def branched(m: Any) -> None:
    lens(m, 1)[0, -1].save()
    m.lm_head(embedded(m, lens(m, 0).argmax(-1))).save()


LENSES: dict[str, Fill] = {
    "all positions": lambda m: lens(m, 0).save(),
    "the last": lambda m: lens(m, 1, -1).softmax(-1).save(),
    "every layer": every_layer,
    "written": written,
    "one after another": branched,
    "beside logits": lambda m: (lens(m, 1, -1).save(), m.output[:, -1].save()),
}


def run(*graphs: Graph, arch: str = "llama", **options: Any) -> list[dict[int, Any]]:
    return ran(model(arch), graphs, **options)


def same(found: dict[int, Any], wanted: dict[int, Any]) -> None:
    assert found.keys() == wanted.keys()
    for node, value in wanted.items():
        torch.testing.assert_close(found[node], value, rtol=1e-4, atol=1e-5)


@contextmanager
def calls(arch: str = "llama") -> Iterator[list[int]]:
    """Rows of each product of the head that isn't the model's own."""
    found: list[int] = []
    local = model(arch)._access.local
    head = local.loaded.modules["lm_head"]
    with called([head], lambda _, value: found.append(value.shape[:-1].numel())):
        yield found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_they_are_the_same_numbers(arch: str) -> None:
    rows = [ROWS[index % len(ROWS)] for index in range(len(LENSES))]
    graphs = [recorded(fill, row, arch) for fill, row in zip(LENSES.values(), rows, strict=True)]
    for graph, shared in zip(graphs, run(*graphs, arch=arch), strict=True):
        (alone,) = run(graph, arch=arch, exclusive=True)
        same(shared, alone)


def test_calls_of_several_jobs_are_one_product() -> None:
    graphs = [recorded(lambda m, at=at: lens(m, at, -1).save(), ROWS[at]) for at in range(3)]
    with calls() as found:
        run(*graphs)
    assert found == [3]


def test_a_job_alone_or_exclusive_has_products_of_its_own() -> None:
    graph = recorded(every_layer, ROWS[0])
    with calls() as found:
        run(graph)
        run(graph, graph, exclusive=True)
    assert found == [1, 3] * 9
    (alone,), (exclusive, _) = run(graph), run(graph, graph, exclusive=True)
    assert all(torch.equal(alone[node], value) for node, value in exclusive.items())


def test_what_a_layer_is_written_with_does_not_wait() -> None:
    with calls() as found:
        run(recorded(written, ROWS[0]), recorded(lambda m: lens(m, 0, -1).save(), ROWS[2]))
    assert found == [3, 4]


def test_many_rows_and_many_calls_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "FEW", 4)
    monkeypatch.setattr(products, "MOST", 8)
    several = [recorded(lambda m: [lens(m, at, -1).save() for at in range(3)], ROWS[0]) for _ in range(4)]
    with calls() as found:
        shared = run(recorded(lambda m: lens(m, 0).save(), ROWS[1]), *several)
    assert sum(found) == 7 + 3 * 4
    assert max(found) <= 8
    for graph, values in zip(several, shared[1:], strict=True):
        same(values, run(graph)[0])


def test_a_layer_is_given_each_jobs_own_rows_though_one_fails_and_one_is_cancelled() -> None:
    def failing(m: Any) -> None:
        tokens = lens(m, 0, -1).argmax(-1)
        lens(m, 1, -1).save()
        embedded(m, m.layers[1].resid_post.argmax(-1) + tokens[:, None] + 10**6).save()

    good = [recorded(LENSES["the last"], ROWS[1]), recorded(LENSES["all positions"], ROWS[4])]
    bad, leaving = recorded(failing, ROWS[2]), recorded(every_layer, ROWS[3])
    sinks = [Kept(), Kept(), Kept(2), Kept()]
    jobs = [EngineJob(g, {}, s) for g, s in zip((good[0], bad, leaving, good[1]), sinks, strict=True)]
    errors = model()._access.local.engine.run(jobs)
    assert [errors[0], errors[3]] == [None, None]
    assert errors[1] is not None and errors[1].op == "call"
    assert isinstance(errors[2], JobCancelled)
    for graph, sink in zip(good, (sinks[0], sinks[3]), strict=True):
        same(sink.values, run(graph)[0])


def test_each_step_of_a_generation_has_its_own() -> None:
    m = model()

    def fill(tracer: Any) -> None:
        for _ in tracer.iter[:3]:
            lens(m, 1, -1).argmax(-1).save()

    graphs = [recording.recorded(m.generate(row, max_new_tokens=3), fill) for row in (ROWS[0], ROWS[1])]
    for graph, shared in zip(graphs, run(*graphs), strict=True):
        same(shared, run(graph)[0])


def test_gradients_flow_through_calls() -> None:
    def fill(m: Any) -> None:
        hidden = m.layers[0].resid_post
        with m.lm_head(hidden)[0, -1].logsumexp(-1).backward():
            hidden.grad.save()

    graphs = [recorded(fill, row) for row in (ROWS[0], ROWS[1])]
    for graph, shared in zip(graphs, run(*graphs), strict=True):
        same(shared, run(graph)[0])
