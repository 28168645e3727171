"""Jobs of every kind handed in at once: each gets what it gets alone, also beside one that fails at some moment."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from interpose.errors import IndexOutOfRange
from interpose.graph.model import Graph
from interpose.runtime.engine import EngineJob
from models import ARCHITECTURES
from recording import Kept, recorded
from recording import opened as model
from torch import Tensor

ROWS = {"four": [5, 9, 33, 7], "one": [44], "long": [7, 8, 14, 90, 121, 33, 60], "heads": [1, 2, 3, 4]}
"""As many positions as heads, one, many."""

Fill = Callable[[Any], None]


def jobs(arch: str) -> dict[str, Graph]:
    """One of each kind."""
    lm = model(arch)
    block = lm.layers[1]

    def writes(_: Any) -> None:
        lm.layers[0].resid_post[:, -1] *= -2
        block.resid_post.save()
        lm.logits.save()

    def looks(_: Any) -> None:
        point = "pattern" if "pattern" in block.points else "resid_pre"
        getattr(block, point)[:, :, -1] *= 0.5
        getattr(block, point).save()
        lm.logits.save()

    def prompts(tracer: Any) -> None:
        for row in (ROWS["long"], ROWS["one"]):
            with tracer.invoke(row):
                block.resid_pre[:, 0, ::2] = 0.25
                lm.logits.save()

    def gradients(_: Any) -> None:
        hidden = block.resid_pre
        with lm.logits[:, -1].square().sum().backward():
            hidden.grad.save()

    def session(_: Any) -> None:
        with lm.trace(ROWS["four"]):
            early = lm.layers[0].resid_post
        with lm.trace(ROWS["heads"]):
            block.resid_post[:, -1] = early[:, 1]
            lm.logits.save()

    def generates(tracer: Any) -> None:
        for _ in tracer.iter[1:3]:
            block.resid_post[:, -1] *= -0.5
            lm.logits.save()
        tracer.result.save()

    square = [ROWS["four"], [8, 1, 2, 3], [9, 9, 1, 4], [11, 12, 13, 14]]
    made = {
        "writes": (lm.trace(square), writes),
        "looks": (lm.trace(ROWS["heads"]), looks),
        "prompts": (lm.trace(), prompts),
        "gradients": (lm.trace(ROWS["long"]), gradients),
        "session": (lm.session(), session),
    }
    if arch != "bert":
        made["generates"] = (lm.generate(ROWS["one"], max_new_tokens=4, eos_token_id=-1), generates)
        sampling = {"do_sample": True, "seed": 7, "temperature": 1.3}
        made["samples"] = (lm.generate(ROWS["long"], max_new_tokens=4, eos_token_id=-1, **sampling), generates)
    return {name: recorded(opened, fill) for name, (opened, fill) in made.items()}


def failing(arch: str, moment: str) -> Graph:
    """A job whose row lookup is outside its table, found at some moment of its run."""
    lm = model(arch)

    def look_up(number: Any) -> None:
        ids = (number * 0).long() + 10**6
        torch.nn.functional.embedding(ids, lm.lm_head.weight).save()

    def in_the_middle(_: Any) -> None:
        lm.layers[1].resid_pre[:] = 7.0
        look_up(lm.layers[1].resid_post[0, 0, 0])

    def at_its_end(_: Any) -> None:
        look_up(lm.logits[0, 0, 0])

    def in_its_backward(_: Any) -> None:
        hidden = lm.layers[1].resid_pre
        with lm.logits[:, -1].square().sum().backward():
            look_up(hidden.grad[0, 0, 0])

    def in_its_generation(tracer: Any) -> None:
        for _ in tracer.iter[2:3]:
            look_up(lm.logits[0, 0, 0])

    def at_its_start(_: Any) -> None:
        look_up(lm.lm_head.weight[0, 0])
        lm.logits.save()

    fill = {one.__name__: one for one in (at_its_start, in_the_middle, at_its_end, in_its_backward)}
    if moment == "in_its_generation":
        return recorded(lm.generate([3] * 9, max_new_tokens=5, eos_token_id=-1), in_its_generation)
    return recorded(lm.trace([3] * 9), fill[moment])


def run(arch: str, graphs: list[Graph]) -> tuple[list[Any], list[dict[int, Any]]]:
    sinks = [Kept() for _ in graphs]
    engine = model(arch)._access.local.engine
    errors = engine.run([EngineJob(graph, {}, sink) for graph, sink in zip(graphs, sinks, strict=True)])
    return errors, [sink.values for sink in sinks]


def close(found: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other, tolerance)
        return
    assert isinstance(expected, Tensor) and found.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(found, expected)
        return
    assert torch.isfinite(expected).all() and expected.abs().max() > 0
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert abs(float(found.norm() / expected.norm()) - 1) <= tolerance


def alike(names: list[str], found: list[dict[int, Any]], expected: list[dict[int, Any]]) -> None:
    for name, one, other in zip(names, found, expected, strict=True):
        assert one.keys() == other.keys()
        assert other, name
        for node, value in other.items():
            close(one[node], value, 1e-4 if name == "gradients" else 1e-5)


@cache
def alone(arch: str) -> dict[str, dict[int, Any]]:
    found = {}
    for name, graph in jobs(arch).items():
        errors, (found[name],) = run(arch, [graph])
        assert errors == [None], name
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kind_beside_every_other(arch: str) -> None:
    graphs = jobs(arch)
    for turn in (1, -1):
        names = [*graphs][::turn]
        errors, together = run(arch, [graphs[name] for name in names])
        assert errors == [None] * len(names)
        alike(names, together, [alone(arch)[name] for name in names])


MOMENTS = ("at_its_start", "in_the_middle", "at_its_end", "in_its_backward", "in_its_generation")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_beside_one_that_fails(arch: str, moment: str) -> None:
    graphs = jobs(arch)
    names = [*graphs]
    for place in (0, 3):
        everyone = [graphs[name] for name in names]
        everyone.insert(place, failing(arch, moment))
        errors, together = run(arch, everyone)
        assert isinstance(errors.pop(place), IndexOutOfRange)
        assert not together.pop(place)
        assert errors == [None] * len(names)
        alike(names, together, [alone(arch)[name] for name in names])
