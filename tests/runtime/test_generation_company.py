"""Generations that others join and leave while they are under way: each gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpose.errors import IndexOutOfRange, InterposeError, JobCancelled, OutOfMemory
from interpose.graph.model import Graph, Invoke, Node, Run
from interpose.graph.values import Ref
from interpose.runtime.engine import EngineJob
from recording import Kept, recorded
from test_generation_batches import blocks, engine, opened, random_generation

FLEXIBLE = ["gpt2", "llama", "opt", "neox"]
FIXED = ["gemma3", "mamba"]
ROWS = (Invoke(((1, 2, 3),)),)


class Company:
    """Jobs that come at given steps, to join or to be run aside."""

    def __init__(self, arch: str, joining: dict[int, list[EngineJob]], aside: dict[int, list[EngineJob]]) -> None:
        self.arch, self.joining, self.aside = arch, joining, aside
        self.step = 0
        self.order: list[tuple[int, EngineJob, InterposeError | None]] = []
        self.joinable: set[bool] = set()

    def due(self) -> bool:
        return self.step + 1 in self.aside

    def pause(self, *, joinable: bool) -> None:
        self.step += 1
        self.joinable.add(joinable)
        for job in self.aside.pop(self.step, ()):
            (error,) = engine(self.arch).run([job])
            self.order.append((self.step, job, error))

    def arrivals(self) -> Sequence[EngineJob]:
        return self.joining.pop(self.step, [])

    def ended(self, job: EngineJob, error: InterposeError | None) -> None:
        self.order.append((self.step, job, error))


def as_job(graph: Graph) -> EngineJob:
    return EngineJob(graph, {}, Kept())


def alone(arch: str, graph: Graph) -> dict[int, Any]:
    sink = Kept()
    assert engine(arch).run([EngineJob(graph, {}, sink, exclusive=True)]) == [None]
    return sink.values


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if expected.is_floating_point():
            assert float((found - expected).abs().max()) <= 2e-5 * max(float(expected.abs().max()), 0.5)
        else:
            assert torch.equal(found, expected)
    else:
        assert found == expected


def check(arch: str, jobs: Sequence[EngineJob]) -> None:
    for job in jobs:
        expected = alone(arch, job.graph)
        assert job.sink.values.keys() == expected.keys()
        for node, value in expected.items():
            same(job.sink.values[node], value)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", FLEXIBLE)
def test_who_joins_at_any_step_gets_what_it_gets_alone(arch: str, seed: int) -> None:
    rng = random.Random(seed)
    begun = [as_job(plain(arch, [5, 9, 33, 7], 9)), as_job(random_generation(arch, seed))]
    later = [as_job(random_generation(arch, 100 * seed + n)) for n in range(5)]
    joining: dict[int, list[EngineJob]] = {}
    for job in later:
        if not job.graph.runs[0].options.get("do_sample"):
            joining.setdefault(rng.randint(1, 7), []).append(job)
    joined = [job for jobs in joining.values() for job in jobs]
    company = Company(arch, dict(joining), {})
    engine(arch).host(begun, company)
    ended = [job for _, job, error in company.order]
    came = [job for job in joined if job in ended]
    assert all(error is None for _, _, error in company.order) and set(map(id, begun)) <= set(map(id, ended))
    check(arch, [*begun, *came])


def plain(arch: str, row: list[int], new: int) -> Graph:
    def fill(tracer: Any) -> None:
        with tracer.all():
            blocks(arch)[1].output[:, -1] *= 1.25
            opened(arch).output[:, -1].save()
        tracer.result.save()

    return recorded(opened(arch).generate(row, max_new_tokens=new), fill)


def forward(arch: str) -> Graph:
    def fill(tracer: Any) -> None:
        blocks(arch)[0].output[:] *= 3
        opened(arch).output[:, -1].save()

    return recorded(opened(arch).trace([8, 9, 10, 77]), fill)


def test_short_ones_end_before_long_ones() -> None:
    long, short, late = (as_job(plain("llama", row, new)) for row, new in (([5, 9], 20), ([7, 8, 9], 3), ([4], 2)))
    company = Company("llama", {6: [late]}, {})
    engine("llama").host([long, short], company)
    assert [(step, job) for step, job, _ in company.order] == [(2, short), (6, late), (19, long)]
    check("llama", [long, short, late])


def test_a_cohort_gives_up_the_room_of_those_that_left() -> None:
    """Rows and padded positions go with them: the last one runs as narrow as alone."""
    long, wide = as_job(plain("llama", [5, 9], 12)), as_job(plain("llama", [7] * 40, 2))
    widths: list[tuple[int, int]] = []
    model = opened("llama")._model
    stock = model.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        widths.append(tuple(kwargs["attention_mask"].shape))
        return stock(*args, **kwargs)

    model.forward = watch
    try:
        engine("llama").host([long, wide], Company("llama", {}, {}))
    finally:
        del model.forward
    assert widths[0] == (2, 40) and widths[1] == (2, 41)
    assert widths[2] == (1, 4) and widths[-1] == (1, 13)
    check("llama", [long, wide])


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mamba"])
def test_forwards_between_steps_disturb_nobody(arch: str) -> None:
    begun = [as_job(plain(arch, [5, 9, 33], 6))]
    aside = [as_job(forward(arch)), as_job(plain(arch, [9, 9], 2))]
    company = Company(arch, {}, {2: [aside[0]], 4: [aside[1]]})
    engine(arch).host(begun, company)
    assert [job for _, job, _ in company.order] == [*aside, *begun]
    check(arch, [*begun, *aside])


@pytest.mark.parametrize("arch", FIXED)
def test_a_cache_without_room_for_others_takes_nobody(arch: str) -> None:
    begun, late = [as_job(plain(arch, [5, 9, 33], 6))], as_job(plain(arch, [9, 9], 2))
    company = Company(arch, {2: [late]}, {})
    engine(arch).host(begun, company)
    assert company.joinable == {False}
    assert [job for _, job, _ in company.order] == begun
    check(arch, begun)


def test_who_fails_on_joining_or_later_fails_alone() -> None:
    def broken(tracer: Any) -> None:
        with tracer.iter[1]:
            hidden = blocks("llama")[0].output
            opened("llama").output[:, -1].index_select(-1, (hidden[:, -1, 0] * 0 + 10_000).long()).save()

    failing = as_job(recorded(opened("llama").generate([3, 4, 5], max_new_tokens=4), broken))
    fine = [as_job(plain("llama", [5, 9, 33], 8)), as_job(plain("llama", [5, 6, 7, 8], 4))]
    company = Company("llama", {2: [failing, fine[1]]}, {})
    engine("llama").host(fine[:1], company)
    errors = {id(job): error for _, job, error in company.order}
    assert isinstance(errors[id(failing)], IndexOutOfRange)
    assert errors[id(fine[0])] is None and errors[id(fine[1])] is None
    check("llama", fine)


def test_after_a_failure_of_all_each_runs_once_more_and_saves_leave_once() -> None:
    jobs = [as_job(plain("llama", [5, 9, 33], 5)), as_job(plain("llama", [6, 6], 3))]
    model = opened("llama")._model
    stock, calls = model.forward, []

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("once")
        return stock(*args, **kwargs)

    model.forward = fail_once
    company = Company("llama", {}, {})
    try:
        engine("llama").host(jobs, company)
    finally:
        del model.forward
    assert {id(job) for _, job, error in company.order if error is None} == set(map(id, jobs))
    check("llama", jobs)


def test_where_one_cant_begin_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first, hungry, behind = (as_job(plain("llama", row, 5)) for row in ([5, 9, 33], [6, 6], [7, 8]))
    stock, tried = engine("llama").start, []

    def start(job: EngineJob) -> Any:
        if job is hungry:
            tried.append(1)
            raise torch.OutOfMemoryError("no room for what is attached")
        return stock(job)

    monkeypatch.setattr(engine("llama"), "start", start)
    company = Company("llama", {2: [hungry, behind]}, {})
    engine("llama").host([first], company)
    errors = {id(job): error for _, job, error in company.order}
    assert tried and isinstance(errors[id(hungry)], OutOfMemory)
    assert errors[id(first)] is None and errors[id(behind)] is None
    check("llama", [first, behind])


def test_where_padding_on_the_left_moves_a_row_lengths_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [as_job(plain("llama", row, 4)) for row in ([5, 9, 33], [6, 6], [7, 8], [1, 2, 3])]
    even = replace(engine("llama").manifest, even_rows="a row changes when it is padded")
    monkeypatch.setattr(engine("llama"), "manifest", even)
    model = opened("llama")._model
    stock, masks = model.forward, []

    def watch(*args: Any, **kwargs: Any) -> Any:
        masks.append(kwargs["attention_mask"])
        return stock(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watch)
    assert engine("llama").run(jobs[:2]) == [None, None]
    engine("llama").host(jobs[2:], Company("llama", {}, {}))
    assert all(bool(mask.all()) for mask in masks) and len(masks) == 4 * len(jobs)
    check("llama", jobs)


def test_a_cancelled_job_says_nothing_more() -> None:
    class Leaving(Kept):
        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []
            self.gone = False

        def log(self, node: int, text: str) -> None:
            self.said.append(text)
            self.gone = self.said.count("a step") == 2

        def tokens(self, run: int, step: int, ids: Sequence[int | None]) -> None:
            self.said.append(str(step))

        def cancelled(self) -> bool:
            return self.gone

    def fill(tracer: Any) -> None:
        with tracer.all():
            tracer.log("a step")

    job = EngineJob(recorded(opened("llama").generate([5, 9], max_new_tokens=5, stream=True), fill), {}, Leaving())
    (error,) = engine("llama").run([job])
    assert isinstance(error, JobCancelled)
    assert job.sink.said == ["a step", "0", "a step", "1"]


def counted(arch: str, joining: dict[int, list[EngineJob]], begun: list[EngineJob], fail_at: int = 0) -> Any:
    """Host with the rows of every forward written down; one of them fails."""
    rows: list[int] = []
    model = opened(arch)._model
    stock = model.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["attention_mask"]))
        if len(rows) == fail_at:
            raise torch.OutOfMemoryError("once")
        return stock(*args, **kwargs)

    model.forward = watch
    company = Company(arch, joining, {})
    try:
        engine(arch).host(begun, company)
    finally:
        del model.forward
    return company, rows


def test_who_fails_before_its_first_forward_costs_the_others_no_step() -> None:
    made = Node(0, "ones", (3,)), Node(1, "full", ((1,), 9)), Node(2, "long", (Ref(1),))
    used = Node(3, "index_select", (Ref(0), 0, Ref(2))), Node(4, "save", (Ref(3),))
    nodes = (*made, *used, Node(5, "tokens"), Node(6, "save", (Ref(5),)))
    begun, late = as_job(plain("llama", [5, 9, 33], 8)), as_job(plain("llama", [6, 6], 3))
    failing = as_job(Graph((Run("generate", ROWS, {"max_new_tokens": 4}),), nodes))
    company, rows = counted("llama", {2: [failing, late]}, [begun])
    errors = {id(job): error for _, job, error in company.order}
    assert len(company.order) == 3 and isinstance(errors.pop(id(failing)), IndexOutOfRange)
    assert set(errors.values()) == {None} and len(rows) == 8 + 1
    check("llama", [begun, late])


def test_a_prompt_that_does_not_fit_costs_those_before_it_no_step() -> None:
    begun, big, late = (as_job(plain("llama", row, new)) for row, new in (([5, 9], 9), ([7] * 50, 3), ([4], 2)))
    company, rows = counted("llama", {3: [big], 5: [late]}, [begun], fail_at=4)
    assert [(job, error) for _, job, error in company.order] == [(begun, None), (big, None)]
    assert rows == [1] * 3 + [1] + [1] * 6 + [1] * 3 and company.joinable == {True, False}
    check("llama", [begun, big])


def test_generations_nobody_looks_at_are_over_at_once() -> None:
    begun, idle = as_job(plain("llama", [5, 9, 33], 5)), as_job(Graph((Run("generate", ROWS, {}),), ()))
    company, rows = counted("llama", {2: [idle]}, [begun])
    assert [(step, job, error) for step, job, error in company.order] == [(2, idle, None), (4, begun, None)]
    assert rows == [1] * 5
