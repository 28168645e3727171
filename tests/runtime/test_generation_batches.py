"""Jobs that generate together: each gets the tokens and values it gets alone, whatever the others do."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpose import LanguageModel
from interpose.errors import IndexOutOfRange, InterposeError, JobCancelled
from interpose.graph.model import Graph
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.hooks import CURRENT
from models import tiny
from recording import Kept, opened, recorded

BLOCKS = {
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "gemma3": "model.layers",
    "opt": "model.decoder.layers",
    "neox": "gpt_neox.layers",
    "mamba": "backbone.layers",
}


def engine(arch: str) -> Engine:
    return opened(arch)._access.local.engine


@pytest.fixture(autouse=True)
def nothing_stays_hooked() -> Iterator[None]:
    yield
    assert CURRENT.get() is None
    for module in engine("gpt2").loaded.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def blocks(arch: str) -> list[Any]:
    module: Any = opened(arch)
    for part in BLOCKS[arch].split("."):
        module = getattr(module, part)
    return list(module)


def random_generation(arch: str, seed: int) -> Graph:
    """One to three prompts, a few tokens; reads and writes at random steps, some sampling, some ending early."""
    rng = random.Random(seed)
    model, new = opened(arch), rng.randint(1, 6)
    options: dict[str, Any] = {"max_new_tokens": new}
    if rng.random() < 0.4:
        options |= {"do_sample": True, "seed": rng.randrange(1000), "temperature": rng.choice([0.5, 1.0, 3.0])}
    if rng.random() < 0.4:
        options |= {"eos_token_id": [rng.randrange(400) for _ in range(40)]}

    def touch() -> None:
        block = rng.choice(blocks(arch))
        hidden = block.output
        kind = rng.randrange(4)
        if kind == 0:
            hidden[:, -1] *= rng.choice([-0.5, 2.0])
        elif kind == 1:
            hidden[:, -1:, :7] = rng.random()
        elif kind == 2 and arch not in ("mamba",):
            (
                block.attn if arch == "gpt2" else block.attention if arch == "neox" else block.self_attn
            ).pattern.save()
        hidden.save()

    def fill(tracer: Any) -> None:
        for _ in range(rng.randint(1, 3)):
            with tracer.invoke([rng.randrange(5, 300) for _ in range(rng.randint(1, 9))]):
                touch()
                for _ in tracer.iter[rng.randrange(new) :]:
                    if rng.random() < 0.5:
                        touch()
                if rng.random() < 0.4:
                    with tracer.iter[rng.randrange(new) :]:
                        blocks(arch)[1].output[:, -1] += 0.3
                        model.output[:, -1].save()
        tracer.result.save()

    return recorded(model.generate(**options), fill)


def run(on: Engine, graphs: Sequence[Graph], sinks: Sequence[Kept] | None = None) -> list[Kept]:
    sinks = sinks or [Kept() for _ in graphs]
    errors = on.run([EngineJob(graph, {}, sink) for graph, sink in zip(graphs, sinks, strict=True)])
    assert errors == [None] * len(graphs)
    return list(sinks)


def close(found: Any, expected: Any, tolerance: float = 3e-5, exact: Any = None) -> None:
    """Tokens equal, numbers equal within a share of the largest, and what has ended absent in both.

    With `exact`, the same alone in float64, numbers may also differ by a few times what the run alone errs by, as
    in test_engine_isolation.
    """
    assert type(found) is type(expected)
    if expected is None:
        return
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
    if isinstance(expected, (dict, list)):
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            close(found[key], expected[key], tolerance, exact if exact is None else exact[key])
        return
    assert found.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(found, expected) and (exact is None or torch.equal(exact, expected))
        return
    ended = expected.isnan()
    assert torch.equal(found.isnan(), ended)
    found, expected = found.masked_fill(ended, 0), expected.masked_fill(ended, 0)
    assert torch.isfinite(expected).all()
    bound = tolerance * max(float(expected.abs().max()), 0.5)
    if exact is not None:
        bound = max(bound, 8 * float((expected - exact.masked_fill(ended, 0)).abs().max()))
    assert float((found - expected).abs().max()) <= bound


@cache
def precise(arch: str) -> Engine:
    return LanguageModel(str(tiny(arch)), dtype="float64")._access.local.engine


@pytest.mark.parametrize("arch", BLOCKS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32))
@example(seed=2071)
def test_jobs_that_generate_together_get_what_each_gets_alone(arch: str, seed: int) -> None:
    graphs = [random_generation(arch, seed + number) for number in range(2 + seed % 4)]
    together = run(engine(arch), graphs)
    for graph, shared in zip(graphs, together, strict=True):
        (alone,) = run(engine(arch), [graph])
        assert any(
            tensor.is_floating_point() for tensor in alone.values.values() if isinstance(tensor, torch.Tensor)
        )
        try:
            close(shared.values, alone.values)
        except AssertionError:
            (exact,) = run(precise(arch), [graph])
            close(shared.values, alone.values, exact=exact.values)


@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_forwards_are_shared(arch: str) -> None:
    graphs = [random_generation(arch, seed) for seed in range(3)]
    looking = [any(node.point and node.point.name == "pattern" for node in graph.nodes) for graph in graphs]
    calls: list[int] = []
    handle = engine(arch).loaded.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        run(engine(arch), graphs)
    finally:
        handle.remove()
    most = [graph.runs[0].options["max_new_tokens"] for graph in graphs]
    groups = [
        max((n for n, looks in zip(most, looking, strict=True) if looks is kind), default=0)
        for kind in (False, True)
    ]
    assert len(calls) <= sum(groups)


def failing(arch: str, step: int) -> Graph:
    """A generation that looks up a row outside a table at one step."""
    model = opened(arch)

    def fill(tracer: Any) -> None:
        for _ in tracer.iter[[step]]:
            ids = model.output[:, -1].argmax(-1) + 10**6
            torch.nn.functional.embedding(ids, model.lm_head.weight).save()
        tracer.result.save()

    return recorded(model.generate([7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], max_new_tokens=5), fill)


@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_neighbour_that_fails_at_some_step_changes_nothing(place: int, step: int) -> None:
    graphs = [random_generation("llama", seed) for seed in (3, 4)]
    everyone = [*graphs[:place], failing("llama", step), *graphs[place:]]
    sinks = [Kept() for _ in everyone]
    errors: list[InterposeError | None] = engine("llama").run(
        [EngineJob(graph, {}, sink) for graph, sink in zip(everyone, sinks, strict=True)]
    )
    assert isinstance(errors.pop(place), IndexOutOfRange)
    assert not sinks.pop(place).values
    assert errors == [None, None]
    for graph, shared in zip(graphs, sinks, strict=True):
        close(shared.values, run(engine("llama"), [graph])[0].values)


@pytest.mark.parametrize("patience", [0, 1, 7, 13])
def test_a_neighbour_that_is_cancelled_changes_nothing(patience: int) -> None:
    graphs = [random_generation("gpt2", seed) for seed in (3, 4)]
    sinks = [Kept(patience), Kept()]
    errors = engine("gpt2").run([EngineJob(g, {}, sink) for g, sink in zip(graphs, sinks, strict=True)])
    assert isinstance(errors[0], JobCancelled)
    assert errors[1] is None
    close(sinks[1].values, run(engine("gpt2"), graphs[1:])[0].values)


def test_traces_and_generations_in_one_call() -> None:
    model = opened("gpt2")
    trace = recorded(model.trace([5, 6, 7]), lambda tracer: model.output.save())
    graphs = [trace, random_generation("gpt2", 8), trace]
    together = run(engine("gpt2"), graphs)
    for graph, shared in zip(graphs, together, strict=True):
        close(shared.values, run(engine("gpt2"), [graph])[0].values)


def test_a_pad_that_is_no_token_is_fed_to_nobody() -> None:
    """A row that has ended is padded with what the user called an end, whatever that is."""
    model = opened("gpt2")
    with model.generate([[5, 9, 33], [7, 8, 81]], max_new_tokens=4, eos_token_id=-1) as tracer:
        plain = tracer.result.save()
    assert plain[0, 3] not in plain[1, 3:]
    ends = [10**9, int(plain[0, 3])]
    with model.generate([[5, 9, 33], [7, 8, 81]], max_new_tokens=4, eos_token_id=ends) as tracer:
        logits = [model.output.save() for _ in tracer.iter[:]]
        tokens = tracer.result.save()
    assert torch.equal(tokens[1], plain[1])
    assert tokens[0, 4:].tolist() == [10**9] * 3
    assert len(logits) == 4
