"""Jobs of several runs in the engine: order, sharing, saves that leave early, conditions carried between runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import IndexOutOfRange
from interpose.graph.model import Graph
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.nests import transform
from models import tiny

ROW = [5, 9, 33, 7]


@cache
def model() -> Any:
    return LanguageModel(str(tiny("llama")))


def engine() -> Engine:
    return model()._access.local.engine  # type: ignore[no-any-return]


class Sink:
    """Keeps copies, and notes when each save came."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.values: dict[int, Any] = {}

    def save(self, node: int, value: Any) -> None:
        self.values[node] = transform(value, torch.clone)
        self.events.append("save")

    def log(self, node: int, text: str) -> None:
        self.events.append("log")

    def cancelled(self) -> bool:
        return False


@contextmanager
def watched() -> Iterator[list[str]]:
    """What happens, in order: "forward <rows>" beside what sinks note."""
    events: list[str] = []
    handle = engine().loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: events.append(f"forward {len(kwargs['input_ids'])}"), with_kwargs=True
    )
    try:
        yield events
    finally:
        handle.remove()


def session(fill: Callable[[], Any]) -> Graph:
    found: list[Graph] = []
    opened = model().session()
    opened._owner.execute = lambda graph, tensors, options: found.append(graph) or {}
    with opened:
        fill()
    return found[0]


def layer(number: int) -> Any:
    return model().model.layers[number]


def run(*graphs: Graph, events: list[str] | None = None) -> list[dict[int, Any]]:
    sinks = [Sink(events if events is not None else []) for _ in graphs]
    errors = engine().run([EngineJob(graph, {}, sink) for graph, sink in zip(graphs, sinks, strict=True)])
    assert errors == [None] * len(graphs)
    return [sink.values for sink in sinks]


def agree(found: Any, expected: Any) -> None:
    if isinstance(expected, (dict, list)):
        assert len(found) == len(expected) > 0
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            agree(found[key], expected[key])
    elif not expected.is_floating_point():
        assert torch.equal(found, expected)
    else:
        assert found.shape == expected.shape
        assert expected.abs().max() > 0
        assert float((found - expected).abs().max()) <= 3e-5 * float(expected.abs().max())


def patching(row: list[int], other: list[int], scale: float) -> Graph:
    def fill() -> None:
        with model().trace(row):
            source = layer(1).output[0][:, -1]
            model().output.save()
        with model().trace(other):
            layer(1).output[0][:, -1] = source * scale
            model().output.save()

    return session(fill)


def test_a_runs_saves_leave_before_the_next_run() -> None:
    with watched() as events:
        run(patching(ROW, [8, 81], 2.0), events=events)
    assert events == ["forward 1", "save", "forward 1", "save"]


def test_sessions_share_their_levels() -> None:
    graphs = [patching(ROW, [8, 81], 2.0), patching([3, 4], ROW, -1.0), patching([60], [61, 62, 63], 0.5)]
    with watched() as events:
        together = run(*graphs, events=events)
    assert [event for event in events if event != "save"] == ["forward 3", "forward 3"]
    for graph, shared in zip(graphs, together, strict=True):
        agree(shared, run(graph)[0])


def random_session(seed: int) -> Graph:
    """Up to five runs, traces and generations; each may write what an earlier one read, if a value says so."""
    rng = random.Random(seed)

    def row() -> list[int]:
        return [rng.randrange(5, 300) for _ in range(rng.randint(1, 7))]

    def fill() -> None:
        carried: list[Any] = []
        for _ in range(rng.randint(2, 5)):
            generating = rng.random() < 0.5
            opened = (
                model().generate(row(), max_new_tokens=rng.randint(1, 4)) if generating else model().trace(row())
            )
            with opened as tracer:
                if carried and rng.random() < 0.8:
                    value, place = rng.choice(carried), layer(rng.randrange(3))

                    def write(value: Any = value, place: Any = place) -> None:
                        place.output[0][:, -1] += value

                    if rng.random() < 0.5:
                        tracer.cond(value.sum() > rng.uniform(-5, 5), write)
                    else:
                        write()
                hidden = layer(rng.randrange(3)).output[0][:, -1]
                carried.append(tracer.loop(2, lambda turn, x: torch.tanh(x) * 1.5, hidden))
                model().output[:, -1].save()
                if generating:
                    with tracer.all():
                        layer(2).output[0].norm().save()
                    tracer.result.save()

    return session(fill)


@pytest.mark.parametrize("seed", range(25))
def test_sessions_together_get_what_each_gets_alone(seed: int) -> None:
    graphs = [random_session(4 * seed + number) for number in range(1 + seed % 4)]
    for graph, shared in zip(graphs, run(*graphs), strict=True):
        agree(shared, run(graph)[0])


def test_one_run_at_a_time_gives_the_same() -> None:
    """Independent runs batched together equal the same traces one by one."""
    rows = [ROW, [8, 81], [3], [60, 61, 62, 63, 64, 65]]

    def fill() -> None:
        for row in rows:
            with model().trace(row):
                layer(1).output[0][:, -1] *= -2
                model().output.save()

    with watched() as events:
        (together,) = run(session(fill), events=events)
    assert events[0] == "forward 4"
    for row, shared in zip(rows, together.values(), strict=True):
        with model().trace(row):
            layer(1).output[0][:, -1] *= -2
            alone = model().output.save()
        agree(shared, alone.value)


def test_a_run_that_fails_keeps_what_left_before() -> None:
    def fill() -> None:
        with model().trace(ROW):
            hidden = model().output.save()
        with model().trace(ROW):
            ids = model().output.argmax(-1) + 10**6 + hidden.sum().long() * 0
            torch.nn.functional.embedding(ids, model().model.embed_tokens.weight).save()
        with model().trace(ROW):
            model().output.save()

    good = patching(ROW, [8, 81], 2.0)
    sinks = [Sink([]), Sink([])]
    with watched() as events:
        errors = engine().run([EngineJob(g, {}, s) for g, s in zip((session(fill), good), sinks, strict=True)])
    assert isinstance(errors[0], IndexOutOfRange)
    assert errors[1] is None
    assert len(sinks[0].values) <= 2
    assert len(events) == 2
    agree(sinks[1].values, run(good)[0])
