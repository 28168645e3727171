"""What a forward leaves out unless asked for: later modules, the head, gradients, a cache, attention's inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import recording
import torch
from interpose.graph.model import Graph
from interpose.runtime.engine import EngineJob
from recording import Kept
from recording import opened as model
from torch.nn import functional

IDS = [5, 9, 33, 7]
BLOCKS = 3
WITH_FUSED = ("gpt2", "llama", "qwen3", "mixtral")
Fill = Callable[[Any], Any]


def graph(arch: str, fill: Fill) -> Graph:
    return recording.recorded(model(arch).trace(IDS), lambda tracer: fill(model(arch)))


def run(arch: str, *graphs: Graph, **options: Any) -> list[Kept]:
    sinks = [Kept() for _ in graphs]
    jobs = [EngineJob(one, {}, sink, **options) for one, sink in zip(graphs, sinks, strict=True)]
    assert model(arch)._access.local.engine.run(jobs) == [None] * len(jobs)
    return sinks


@contextmanager
def counted(arch: str) -> Iterator[Counter[str]]:
    """How often each block and the head were begun; under "grad" and "cache", what they were begun with."""
    loaded, calls = model(arch)._access.local.loaded, Counter[str]()
    parts = {path: loaded.modules[path] for path in (*loaded.manifest.blocks, loaded.manifest.roles["unembed"])}

    def note(name: str) -> Callable[..., None]:
        def begun(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            calls[name] += 1
            calls["grad"] += torch.is_grad_enabled()
            # A block of GPT-2's is given its cache by position.
            calls["cache"] += any(type(given).__name__.endswith("Cache") for given in (*args, *kwargs.values()))

        return begun

    handles = [module.register_forward_pre_hook(note(path), with_kwargs=True) for path, module in parts.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("options", [{}, {"exclusive": True}], ids=["auto", "exclusive"])
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("last", range(BLOCKS))
@pytest.mark.parametrize("arch", WITH_FUSED)
def test_what_comes_after_the_last_point_is_not_run(
    arch: str, last: int, together: int, options: dict[str, Any]
) -> None:
    graphs = [graph(arch, lambda m: m.layers[last].resid_post.save())] * together
    loaded = model(arch)._access.local.loaded
    with counted(arch) as calls:
        run(arch, *graphs, **options)
    forwards = together if options else 1
    assert {path: calls[path] for path in loaded.manifest.blocks} == {
        path: forwards * (place <= last) for place, path in enumerate(loaded.manifest.blocks)
    }
    assert calls[loaded.manifest.roles["unembed"]] == 0


@pytest.mark.parametrize("arch", WITH_FUSED)
def test_a_loss_on_hidden_states_runs_no_head_and_a_lens_runs_it_on_what_it_asks(arch: str) -> None:
    def loss(m: Any) -> None:
        hidden = m.layers[1].resid_post
        with hidden.pow(2).sum().backward():
            hidden.grad.save()

    head = model(arch)._access.local.loaded.manifest.roles["unembed"]
    with counted(arch) as calls:
        run(arch, graph(arch, loss))
    assert calls[head] == 0
    with counted(arch) as calls:
        (sink,) = run(arch, graph(arch, lambda m: m.lm_head(m.layers[0].resid_post[:, -1]).save()))
    assert calls[head] == 1 and calls[model(arch)._access.local.loaded.manifest.blocks[1]] == 0
    assert next(iter(sink.values.values())).shape[:-1] == (1,)


@pytest.mark.parametrize("arch", WITH_FUSED)
def test_no_gradients_and_no_cache_unless_asked_for(arch: str) -> None:
    read = graph(arch, lambda m: m.output.save())
    with counted(arch) as calls:
        (sink,) = run(arch, read)
    assert (calls["grad"], calls["cache"]) == (0, 0)
    assert not any(value.requires_grad for value in sink.values.values())

    def loss(m: Any) -> None:
        hidden = m.layers[0].resid_post
        with m.output.sum().backward():
            hidden.grad.save()

    with counted(arch) as calls:
        run(arch, graph(arch, loss))
    assert calls["grad"] == BLOCKS + 1
    with counted(arch) as calls:
        run(arch, read, exclusive=True)
    assert calls["cache"] == BLOCKS, "a plain forward makes one, and exclusive runs are plain forwards"


@pytest.mark.parametrize("arch", WITH_FUSED)
def test_attention_is_fused_unless_its_inside_is_looked_at(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[str]()
    fused = functional.scaled_dot_product_attention

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls["fused"] += 1
        return fused(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", count)
    run(arch, graph(arch, lambda m: m.output.save()))
    assert calls.pop("fused") == BLOCKS
    run(arch, graph(arch, lambda m: m.layers[0].q.save()))
    assert calls.pop("fused", 0) <= 1, "what comes after the queries may have been left out"
    run(arch, graph(arch, lambda m: (m.layers[0].pattern.save(), m.output.save())))
    assert calls["fused"] == 0
