"""Logits of last positions alone: when they are all that is made, and that nobody could tell."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import recording
import torch
from interpose import LanguageModel
from interpose.graph.model import Graph
from interpose.runtime.engine import EngineJob
from recording import Kept, ran
from recording import opened as model
from transformers import BertConfig, BertLMHeadModel

ROWS = ([5, 9, 33], [7, 8, 14, 90, 121, 33, 60], [44], [12, 13, 14])
Fill = Callable[[Any], Any]


def recorded(arch: str, fill: Fill, row: Any) -> Graph:
    return recording.recorded(model(arch).trace(row), lambda tracer: fill(model(arch)))


LAST: dict[str, Fill] = {
    "every row's": lambda m: m.output[:, -1].save(),
    "one row's": lambda m: m.logits[0, -1].save(),
    "kept as a dimension": lambda m: m.output.logits[:, -1:].save(),
    "after dots": lambda m: m.lm_head.output[..., -1, :].save(),
    "in two steps": lambda m: m.output[0][-1].topk(3).values.save(),
    "one token's": lambda m: m.output[0, -1, 17].save(),
    "several ways": lambda m: (m.output[0, -1].argmax(-1).save(), m.output[:, -1].softmax(-1).save()),
    "beside others": lambda m: (m.layers[0].resid_post.save(), m.output[:, -1].save()),
    "no logits": lambda m: m.layers[1].resid_post.save(),
}
MORE: dict[str, Fill] = {
    "all": lambda m: m.output.save(),
    "the first": lambda m: m.output[:, 0].save(),
    "the last two": lambda m: m.output[:, -2:].save(),
    "reduced": lambda m: m.output.max(-1).values.save(),
    "what the head is given": lambda m: m.lm_head.input.save(),
    "a row of positions": lambda m: m.output[0].save(),
}


def written(m: Any) -> None:
    m.output[:, -1] *= 2
    m.output[:, -1].save()


def differentiated(m: Any) -> None:
    logits = m.output
    with logits[0, -1].logsumexp(-1).backward():
        logits.grad.save()


MORE |= {"written": written, "differentiated": differentiated}


def run(arch: str, *graphs: Graph, **options: Any) -> list[dict[int, Any]]:
    return ran(model(arch), graphs, **options)


def as_alone(arch: str, *graphs: Graph) -> None:
    for graph, shared in zip(graphs, run(arch, *graphs), strict=True):
        (alone,) = run(arch, graph, exclusive=True)
        for node, value in alone.items():
            assert shared[node].shape == value.shape
            assert value.abs().max() > 0
            assert float((shared[node] - value).abs().max()) <= 1e-5 * float(value.abs().max())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom", "gemma2", "mixtral"])
def test_they_are_the_same_numbers(arch: str) -> None:
    rows = [ROWS[index % len(ROWS)] for index in range(len(LAST))]
    as_alone(arch, *(recorded(arch, fill, row) for fill, row in zip(LAST.values(), rows, strict=True)))
    several = recorded(arch, lambda m: m.output[:, -1].save(), [ROWS[0], ROWS[1]])
    as_alone(arch, several, recorded(arch, LAST["one row's"], ROWS[2]))


def watched(monkeypatch: pytest.MonkeyPatch, *graphs: Graph, **options: Any) -> list[Any]:
    found: list[Any] = []
    kind = type(model("llama")._model)  # not the model's own: with a forward that is set on it nothing is dropped
    forward = kind.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs.get("logits_to_keep"))
        return forward(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", watch)
        run("llama", *graphs, **options)
    return found


@pytest.mark.parametrize("name", LAST)
def test_they_are_all_that_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same = [recorded("llama", LAST[name], ROWS[0]), recorded("llama", LAST["one row's"], ROWS[3])]
    assert watched(monkeypatch, *same) == [1]
    (keep,) = watched(monkeypatch, *same, recorded("llama", LAST["one row's"], ROWS[1]))
    assert keep.tolist() == [2, 6]


@pytest.mark.parametrize("name", MORE)
def test_whoever_looks_further_gets_all_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = recorded("llama", MORE[name], ROWS[0]), recorded("llama", LAST["one row's"], ROWS[3])
    assert all(keep is None for keep in watched(monkeypatch, *graphs))
    as_alone("llama", *graphs)


def test_alone_and_exclusive_forwards_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = recorded("llama", LAST["one row's"], ROWS[0])
    assert watched(monkeypatch, graph) == [None]
    assert watched(monkeypatch, graph, graph, exclusive=True) == [None, None]


@cache
def deep_headed() -> LanguageModel:
    """A head of several modules, all of which see the positions that are kept alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=48, is_decoder=True)
    return LanguageModel(BertLMHeadModel(config))


@pytest.mark.parametrize("kind", ["trace", "generate"])
def test_what_lies_within_the_head_has_all_its_positions(kind: str) -> None:
    bert = deep_headed()

    def graph(row: list[int], *, within: bool) -> Graph:
        found: list[Graph] = []
        block = bert.trace([row]) if kind == "trace" else bert.generate([row], max_new_tokens=3)
        block._owner.execute = lambda made, tensors, options: found.append(made) or {}
        with block:
            if within:
                bert.cls.predictions.transform.dense.output.save()
            else:
                bert.logits[:, -1].save()
        return found[0]

    graphs = [graph([5, 9, 33], within=True), graph([7, 8, 14, 90], within=False), graph([4, 9], within=False)]
    sinks = [Kept() for _ in graphs]
    engine = bert._access.local.engine
    assert engine._tail is not None
    assert engine.run([EngineJob(made, {}, sink) for made, sink in zip(graphs, sinks, strict=True)]) == [None] * 3
    for made, sink in zip(graphs, sinks, strict=True):
        alone = Kept()
        assert engine.run([EngineJob(made, {}, alone, exclusive=True)]) == [None]
        for node, value in alone.values.items():
            assert sink.values[node].shape == value.shape and value.abs().max() > 0
            assert float((sink.values[node] - value).abs().max()) <= 1e-5 * float(value.abs().max())
