"""What bodies may hold and cost: work counted once a turn, limits known beforehand, loops that can be stopped."""

from __future__ import annotations

from typing import Any

import pytest
from interpose import LanguageModel
from interpose.errors import BadArgument, JobCancelled, LimitExceeded
from interpose.graph.limits import UNLIMITED, Limits
from interpose.graph.model import Graph
from interpose.graph.validate import validate
from interpose.runtime.engine import EngineJob
from models import tiny

ROW = [5, 9, 33, 7]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")))


def recorded(tracer: Any, fill: Any) -> Graph:
    """The graph of a block, which isn't run."""
    found: list[Graph] = []
    tracer._owner.execute = lambda graph, tensors, options: found.append(graph) or {}
    with tracer:
        fill(tracer)
    return found[0]


def looping(model: Any, *counts: int) -> Graph:
    """Loops within loops around one matrix product."""

    def fill(tracer: Any) -> None:
        hidden = model.transformer.h[0].output[0][0, :, :4]

        def nested(x: Any, rest: tuple[int, ...]) -> Any:
            return tracer.loop(rest[0], lambda turn, y: nested(y, rest[1:]), x) if rest else x @ x

        nested(hidden, counts).save()

    return recorded(model.trace(ROW), fill)


def flops(model: Any, graph: Graph) -> int:
    return validate(graph, model.manifest, UNLIMITED).footprint.flops


def test_work_is_counted_once_a_turn(model: Any) -> None:
    once = flops(model, looping(model, 1))
    assert once > 0
    assert flops(model, looping(model, 10)) == 10 * once
    assert flops(model, looping(model, 20, 7)) == 2 * flops(model, looping(model, 10, 7))
    assert flops(model, looping(model, 10, 7)) >= 70 * once


def test_a_loop_beyond_the_limit_never_runs(model: Any) -> None:
    graph = looping(model, 100, 100, 100)
    limits = Limits(flops=flops(model, looping(model, 100, 100)))
    with pytest.raises(LimitExceeded, match=r"flops|operations"):
        validate(graph, model.manifest, limits)
    sink = Sink()
    (error,) = model._access.local.engine.run([EngineJob(graph, {}, sink, limits)])
    assert isinstance(error, LimitExceeded)
    assert not sink.asked


def test_work_at_every_step_is_counted_once_a_step(model: Any) -> None:
    def fill(tracer: Any) -> None:
        with tracer.all():
            hidden = model.transformer.h[0].output[0]
            (model.lm_head.weight @ model.lm_head.weight.T).sum().save()
            hidden.sum().save()

    one, five = (recorded(model.generate(ROW, max_new_tokens=count), fill) for count in (1, 5))
    assert flops(model, five) == 5 * flops(model, one) > 0
    results = [validate(graph, model.manifest, UNLIMITED).footprint.result_bytes for graph in (one, five)]
    assert results[1] == 5 * results[0]


class Sink:
    """Says to give up once it has been asked `patience` times."""

    def __init__(self, patience: int = 10**9) -> None:
        self.asked = 0
        self.patience = patience
        self.saved: list[int] = []

    def save(self, node: int, value: Any) -> None:
        self.saved.append(node)

    def log(self, node: int, text: str) -> None:
        pass

    def cancelled(self) -> bool:
        self.asked += 1
        return self.asked > self.patience


def test_a_cancelled_loop_stops(model: Any) -> None:
    sink = Sink(50)
    (error,) = model._access.local.engine.run([EngineJob(looping(model, 1000, 100), {}, sink)])
    assert isinstance(error, JobCancelled)
    assert sink.asked <= 60
    assert not sink.saved


def test_nesting_has_an_end(model: Any) -> None:
    with pytest.raises(Exception, match="nest deeper"):
        looping(model, *[1] * 9)


def test_what_a_loop_cannot_hold(model: Any) -> None:
    other = model.transformer.h[1]
    bodies = {
        "read": lambda x: x + other.output[0],
        "save": lambda x: x.save(),
        "backward": lambda x: x.sum().backward() and x,
        "write": lambda x: other.points.__setitem__("output", x),
    }
    for name, body in bodies.items():
        with (
            model.scan(ROW) as tracer,
            pytest.raises(BadArgument, match="can't be repeated in a loop") as caught,
        ):
            tracer.loop(2, lambda turn, x, body=body: body(x), model.transformer.h[0].output[0])
        assert name in caught.value.message
