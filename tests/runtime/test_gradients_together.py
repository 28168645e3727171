"""Jobs with gradients that share one forward and one backward of their summed losses: each as it is alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import recording
import torch
from interpose.errors import InterposeError, NotReached
from interpose.graph.limits import UNLIMITED
from interpose.graph.model import Graph
from interpose.graph.validate import validate
from interpose.runtime.engine import EngineJob
from recording import Kept
from recording import opened as model

ROWS = {"short": [5, 9, 33], "long": [7, 8, 14, 90, 121, 33, 60], "one": [44]}
Fill = Callable[[Any, Any], None]


def recorded(arch: str, fill: Fill, *rows: str) -> Graph:
    def filled(tracer: Any) -> None:
        for row in rows:
            with tracer.invoke(ROWS[row]):
                fill(model(arch), tracer)

    return recording.recorded(model(arch).trace(), filled)


def reads(model: Any, tracer: Any) -> None:
    early, late = model.layers[0].resid_post, model.layers[1].resid_post
    with model.logits[:, -1].logsumexp(-1).sum().backward():
        early.grad.save()
        late.grad.save()


def replaces(model: Any, tracer: Any) -> None:
    early, late = model.layers[0].resid_post, model.layers[1].mlp_post
    with model.logits[0, -1, 7].backward():
        late.grad[:, -1] = late.grad[:, -1] * -3
        late.grad.save()
        early.grad.save()


def writes_too(model: Any, tracer: Any) -> None:
    hidden = model.layers[0].resid_post
    hidden[:, -1] *= 2
    with (model.layers[2].resid_post ** 2).sum().backward():
        hidden.grad.save()
    model.logits.save()


def twice(model: Any, tracer: Any) -> None:
    hidden = model.layers[1].resid_post
    logits = model.logits[0, -1]
    with logits[3].backward():
        first = hidden.grad.save()
    with (logits[5] * first.norm()).backward():
        hidden.grad.save()


def early_loss(model: Any, tracer: Any) -> None:
    hidden = model.layers[0].resid_post
    with model.layers[0].mlp_post.sum().backward():
        model.layers[0].resid_mid.grad.save()
    with model.layers[1].resid_post.norm().backward():
        hidden.grad.save()


KINDS: dict[str, tuple[Fill, tuple[str, ...]]] = {
    "reads": (reads, ("long",)),
    "one token": (reads, ("one",)),
    "replaces": (replaces, ("short",)),
    "writes too": (writes_too, ("long",)),
    "twice": (twice, ("short",)),
    "early loss": (early_loss, ("long",)),
    "two prompts": (reads, ("short", "long")),
}


def run(arch: str, *graphs: Graph, **options: Any) -> list[Any]:
    sinks = [Kept() for _ in graphs]
    jobs = [EngineJob(graph, {}, sink, **options) for graph, sink in zip(graphs, sinks, strict=True)]
    errors = model(arch)._access.local.engine.run(jobs)
    return [error or sink.values for error, sink in zip(errors, sinks, strict=True)]


def as_alone(arch: str, graphs: list[Graph], together: list[Any]) -> None:
    for graph, shared in zip(graphs, together, strict=True):
        (alone,) = run(arch, graph, exclusive=True)
        assert not isinstance(alone, InterposeError), alone
        assert shared.keys() == alone.keys()
        for node, value in alone.items():
            assert value.shape == shared[node].shape
            assert torch.isfinite(value).all() and value.abs().max() > 0
            assert float((shared[node] - value).abs().max()) <= 1e-4 * float(value.abs().max())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "neox", "mixtral", "opt"])
def test_each_gets_what_it_gets_alone(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: kind for name, kind in KINDS.items() if arch == "llama" or name in ("reads", "two prompts")}
    if arch in ("llama", "gpt2", "gemma3", "opt"):
        kinds["writes too"] = KINDS["writes too"]
    graphs = [recorded(arch, fill, *rows) for fill, rows in kinds.values()]
    count = {"forwards": 0, "backwards": 0}
    forward, backward = model(arch)._model.forward, torch.autograd.backward

    def forwards(*args: Any, **kwargs: Any) -> Any:
        count["forwards"] += 1
        return forward(*args, **kwargs)

    def backwards(*args: Any, **kwargs: Any) -> Any:
        count["backwards"] += 1
        return backward(*args, **kwargs)

    monkeypatch.setattr(model(arch)._model, "forward", forwards)
    monkeypatch.setattr(torch.autograd, "backward", backwards)
    together = run(arch, *graphs)
    assert count == {"forwards": 1, "backwards": 2 if {"twice", "early loss"} & kinds.keys() else 1}
    monkeypatch.undo()
    as_alone(arch, graphs, together)


def test_what_a_gradient_decides_later_in_the_forward_runs_alone() -> None:
    def steers(model: Any, tracer: Any) -> None:
        hidden = model.layers[0].resid_post
        with model.layers[1].resid_post.norm().backward():
            push = hidden.grad
        model.layers[2].resid_post += push
        model.logits.save()

    graph = recorded("llama", steers, "long")
    manifest = model("llama").manifest
    assert validate(graph, manifest, UNLIMITED).footprint.exclusive
    others = [recorded("llama", fill, *rows) for fill, rows in (KINDS["reads"], KINDS["replaces"])]
    for other in others:
        footprint = validate(other, manifest, UNLIMITED).footprint
        assert footprint.gradients and not footprint.exclusive
    graphs = [others[0], graph, others[1]]
    as_alone("llama", graphs, run("llama", *graphs))


def test_a_gradient_of_one_run_may_be_written_in_the_next_beside_others() -> None:
    lm = model("llama")

    def filled(session: Any) -> None:
        with lm.trace(ROWS["long"]):
            hidden = lm.layers[0].resid_post
            with lm.logits[0, -1, 3].backward():
                push = hidden.grad
        with lm.trace(ROWS["long"]):
            lm.layers[0].resid_post += push
            lm.logits.save()

    graph = recording.recorded(lm.session(), filled)
    assert not validate(graph, lm.manifest, UNLIMITED).footprint.exclusive
    graphs = [graph, recorded("llama", reads, "short")]
    as_alone("llama", graphs, run("llama", *graphs))


def test_a_neighbour_that_fails_in_the_backward_fails_alone() -> None:
    def hopeless(model: Any, tracer: Any) -> None:
        hidden = model.layers[1].resid_post
        with (hidden.detach().sum() + model.layers[0].resid_post.sum()).backward():
            hidden.grad.save()

    def cut_off(model: Any, tracer: Any) -> None:
        hidden = model.layers[0].resid_post
        model.layers[1].resid_post = hidden.detach() * 0 + 1
        with model.logits[0, -1, 3].backward():
            hidden.grad.save()

    def explodes(model: Any, tracer: Any) -> None:
        hidden = model.layers[1].resid_post
        with (model.logits.sum() * float("inf")).backward():
            hidden.grad.save()

    def wrong_size(model: Any, tracer: Any) -> None:
        hidden = model.layers[1].resid_post
        with model.logits[0, -1, 3].backward():
            picked = hidden.grad[hidden.grad > 0]
            hidden.grad[:, 0] = picked
            hidden.grad.save()

    fine = [recorded("llama", fill, *rows) for fill, rows in (KINDS["reads"], KINDS["replaces"])]
    graphs = [
        fine[0],
        *(recorded("llama", fill, "short") for fill in (hopeless, explodes, wrong_size, cut_off)),
        fine[1],
    ]
    together = run("llama", *graphs)
    assert isinstance(together[1], NotReached)
    assert isinstance(together[4], NotReached)  # zeros that come by way of others are no gradient
    assert not torch.isfinite(next(iter(together[2].values()))).all()
    assert isinstance(together[3], InterposeError) and together[3].node is not None
    as_alone("llama", fine, [together[0], together[-1]])
