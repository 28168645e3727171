"""Jobs with gradients among others: their neighbours are as alone, and nothing of a backward stays behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import recording
import torch
from interpose import LanguageModel
from interpose.errors import NotReached
from interpose.graph.model import Graph
from interpose.runtime.engine import EngineJob
from interpose.tracing.torch_face import SavedTensor
from models import tiny
from recording import Kept

ROW = [5, 9, 33, 7, 8]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("llama")))


def tracked() -> int:
    """How many tensors hold a graph of gradients, or would."""
    gc.collect()
    # By exact class: other tests' subclasses answer for their attributes in ways of their own.
    kinds = (torch.Tensor, torch.nn.Parameter, SavedTensor)
    return sum(type(item) in kinds and item.requires_grad for item in gc.get_objects())


@pytest.fixture(autouse=True)
def nothing_stays(model: Any) -> Iterator[None]:
    model.manifest  # noqa: B018 - loads it
    before = tracked()
    yield
    assert tracked() == before
    for param in model._model.parameters():
        assert param.grad is None
        assert not param.requires_grad


def recorded(tracer: Any, fill: Any) -> Graph:
    return recording.recorded(tracer, lambda _: fill())


def gradient(model: Any, token: int) -> Graph:
    def fill() -> None:
        hidden = model.model.layers[1].output[0]
        with model.output[0, -1, token].backward():
            hidden.grad = hidden.grad * 2
            hidden.grad.save()
            model.model.layers[0].output[0].grad.save()
        model.output.save()

    return recorded(model.trace(ROW), fill)


def plain(model: Any) -> Graph:
    def fill() -> None:
        model.model.layers[1].output[0][:, -1] *= 2
        model.output.save()

    return recorded(model.trace(ROW[:3]), fill)


def hopeless(model: Any) -> Graph:
    def fill() -> None:
        hidden = model.model.layers[0].output[0]
        with hidden.detach().sum().backward():
            hidden.grad.save()

    return recorded(model.trace(ROW), fill)


def run(model: Any, *graphs: Graph) -> list[Any]:
    sinks = [Kept() for _ in graphs]
    jobs = [EngineJob(graph, {}, sink) for graph, sink in zip(graphs, sinks, strict=True)]
    errors = model._access.local.engine.run(jobs)
    return [error or sink.values for error, sink in zip(errors, sinks, strict=True)]


def test_among_others_each_is_as_alone(model: Any) -> None:
    graphs = [plain(model), gradient(model, 3), plain(model), hopeless(model), gradient(model, 77)]
    together = run(model, *graphs)
    assert isinstance(together[3], NotReached)
    for graph, shared in zip(graphs, together, strict=True):
        (alone,) = run(model, graph)
        if isinstance(alone, NotReached):
            continue
        assert shared.keys() == alone.keys()
        for node, value in alone.items():
            assert value.abs().max() > 0
            assert not shared[node].requires_grad
            assert float((shared[node] - value).abs().max()) <= 1e-5 * float(value.abs().max())


def test_the_callers_own_mode_is_untouched(model: Any) -> None:
    weight = torch.randn(64, requires_grad=True)
    with model.trace(ROW):
        hidden = model.model.layers[1].output[0].save()
        hidden.retain_grad()
        (hidden * weight).sum().backward()
    assert torch.is_grad_enabled()
    assert weight.grad is None
    assert torch.allclose(hidden.grad, weight.detach().expand(1, 5, 64))
    (hidden.value * weight).sum().backward()
    assert weight.grad is not None
    del hidden, weight


def test_saved_values_can_be_trained_on(model: Any) -> None:
    with model.trace(ROW):
        hidden = model.model.layers[1].output[0].save()
    probe = torch.nn.Linear(64, 2)
    before = probe.weight.detach().clone()
    optimizer = torch.optim.SGD(probe.parameters(), 0.1)
    probe(hidden).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(before, probe.weight)
    del probe, optimizer, hidden
