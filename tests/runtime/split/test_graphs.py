"""Jobs on a split model: what each gets is what it gets on the whole one, and shards do no more than they must."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import IndexOutOfRange, InternalError, JobCancelled, LimitExceeded, NotReached
from interpose.graph.limits import UNLIMITED
from interpose.graph.model import Graph, Invoke, Node, Run
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import load
from interpose.runtime.split.guest import Graphs
from models import tiny
from sharding import split
from test_engine_isolation import BLOCK, LOGITS, Kept, close, failing, graph, random_job, read, run, save

ROW = [7, 21, 90, 33, 150, 61]


@cache
def whole(arch: str) -> Engine:
    return Engine(load(tiny(arch)))


@cache
def shards(arch: str, parts: int = 3) -> Engine:
    return Engine(split(whole(arch).loaded, parts))


@cache
def language(parts: int) -> LanguageModel:
    model = LanguageModel(str(tiny("gpt2")))
    if parts:
        model._access.local.engine = shards("gpt2", parts)
    return model


@contextmanager
def watched(engine: Engine) -> Iterator[list[tuple[int, Any]]]:
    """(site, work) of each visit of a shard's guest."""
    seen: list[tuple[int, Any]] = []
    visit = Graphs.visit

    def noted(self: Graphs, work: Any, mail: Any, go: Any) -> Any:
        seen.append((self._site, work))
        return visit(self, work, mail, go)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graphs, "visit", noted)
        yield seen


def parts(engine: Engine) -> int:
    """Jobs that shards still know."""
    split_ = engine.loaded.split
    assert split_ is not None
    return sum(len(stop.station.guest._parts) for stop in split_.route._stops.values())  # type: ignore[attr-defined]


def equal(found: Kept, expected: Kept) -> None:
    assert found.values.keys() == expected.values.keys()
    for node, values in expected.values.items():
        for one, other in zip(found.values[node], values, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "bert", "mamba"])
def test_random_jobs_together_are_as_on_the_whole_model(arch: str) -> None:
    for seed in range(12):
        graphs = [random_job(100 * seed + n, whole(arch).manifest) for n in range(3)]
        for found, expected in zip(run(shards(arch), graphs), run(whole(arch), graphs), strict=True):
            close(found, expected)  # a layer called on a value that travelled finds it lying otherwise in memory
    assert parts(shards(arch)) == 0


@pytest.mark.parametrize("seed", range(6))
def test_an_exclusive_job_is_bitwise_that_on_the_whole_model(seed: int) -> None:
    job = random_job(seed, whole("llama").manifest)
    (found,), (expected,) = (run(on, [job], exclusive=True) for on in (shards("llama"), whole("llama")))
    equal(found, expected)


def test_later_shards_are_not_called() -> None:
    with watched(shards("gpt2")) as seen:
        run(shards("gpt2"), [graph(read(0, BLOCK.format(1)), save(1, 0))])
    assert [site for site, _ in seen] == [2]
    calls = Counter[str]()
    handles = []
    split_ = shards("gpt2").loaded.split
    assert split_ is not None
    for stop in split_.route._stops.values():  # type: ignore[attr-defined]
        for path, block in stop.station._blocks.items():
            handles.append(block.register_forward_hook(lambda *_, path=path: calls.update([path])))
    run(shards("gpt2"), [graph(read(0, BLOCK.format(1)), save(1, 0))])
    for handle in handles:
        handle.remove()
    assert calls == {BLOCK.format(0): 1, BLOCK.format(1): 1}


def test_a_job_that_fails_on_a_shard_fails_alone_with_its_node() -> None:
    on = shards("gpt2")
    graphs = [random_job(seed, on.manifest) for seed in (11, 12)]
    sinks = [Kept() for _ in range(3)]
    jobs = [EngineJob(one, {}, sink) for one, sink in zip((graphs[0], failing(1), graphs[1]), sinks, strict=True)]
    errors = on.run(jobs)
    assert isinstance(errors[1], IndexOutOfRange)
    assert (errors[1].node, errors[1].op) == (4, "embedding")
    assert errors[0] is errors[2] is None
    for found, one in zip((sinks[0], sinks[2]), graphs, strict=True):
        close(found, run(whole("gpt2"), [one])[0])
    assert parts(on) == 0


def test_a_job_is_cancelled_though_all_of_it_is_on_shards() -> None:
    job = graph(*[node for n in range(3) for node in (read(2 * n, BLOCK.format(n)), save(2 * n + 1, 2 * n))])
    (error,) = shards("gpt2").run([EngineJob(job, {}, Kept(0))])
    assert isinstance(error, JobCancelled)


def test_results_count_wherever_they_leave() -> None:
    job = graph(read(0, BLOCK.format(0)), save(1, 0), replace(LOGITS, id=2), save(3, 2))
    limits = replace(UNLIMITED, result_bytes=4000)
    (error,) = shards("gpt2").run([EngineJob(job, {}, Kept(), limits=limits)])
    assert isinstance(error, LimitExceeded)


def both(use: Any, *, exact: bool = True) -> None:
    """What a program saves on the split model is bitwise what it saves on the whole.

    But for gradients that come to a value by several ways: they are summed in another order.
    """
    found, expected = use(language(3)), use(language(0))
    assert len(found) == len(expected) > 0
    for one, other in zip(map(torch.as_tensor, found), map(torch.as_tensor, expected), strict=True):
        error = float((one - other).abs().max())
        assert error == 0 if exact else error <= 1e-6 * float(other.abs().max())


def test_values_travel_forward_and_weights_come_from_their_shards() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW):
            early = h[0].output
            mixed = h[2].output * 0.5 + early
            h[2].output[:] = mixed
            weights = (h[1].mlp.c_fc.weight[:4] @ h[2].mlp.c_fc.weight[:4].T).save()
            logits = model.logits.save()
        return weights, logits

    both(use)


def test_a_later_shard_is_written_what_home_made_of_an_earlier_one() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW):
            h[2].output[:] = model.transformer.ln_f(h[0].output)
            lens = model.lm_head(model.transformer.ln_f(h[1].output)).save()
            logits = model.logits.save()
        return lens, logits

    both(use)


def test_modules_of_one_shard_are_called_on_values_of_another() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW):
            early = h[0].output
            early.retain_grad()
            late = h[2].mlp(h[0].output)
            back = h[0].mlp(h[2].output).save()
            h[2].output[:] = h[2].output + h[0].mlp(early)
            loss = (model.logits[0, -1, 5] + late.sum()).save()
            loss.backward()
        return back, early.grad, loss

    both(use, exact=False)


def test_conditions_and_loops_over_shards() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        saved = []
        for wanted in (0.0, 1e9):
            with model.trace(ROW) as t:
                big = h[0].output.abs().max() > wanted

                def then() -> None:
                    h[1].output[:, -1] *= 2.0
                    h[2].output[:, 0] += h[0].output[:, 1]

                t.cond(big, then, lambda: None)
                saved.append(model.logits.save())
        with model.trace(ROW) as t:
            own = h[1].output
            value = t.loop(3, lambda i, x: model.transformer.ln_f(x) + own, h[0].output)
            saved.append(value.save())
        return saved

    both(use)


def test_a_session_whose_later_run_takes_what_an_earlier_one_made_further_on() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.session():
            with model.trace(ROW):
                late = h[2].output
            with model.trace(ROW[::-1]):
                h[0].output[:] = late
                early = h[0].output.save()
                logits = model.logits.save()
            difference = (logits - late.sum()).save()
        return early, logits, difference

    both(use)


def test_gradients_replaced_on_shards_and_losses_made_there() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW):
            first, last = h[0].output, h[2].output
            loss = (last * first).sum() + model.logits[0, -1, 7]
            with loss.backward():
                late = last.grad
                saved = late.save()
                first.grad = first.grad * 2 + late
                early = first.grad.save()
        return saved, early

    both(use, exact=False)


def test_a_generation_with_a_write_each_step_and_values_between_steps() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.generate([ROW, ROW[:3]], max_new_tokens=4) as t:
            with t.all():
                h[0].output[:, -1] += h[0].output[:, -1].mean()
                each = h[2].output[:, -1].save()
            for _ in t.iter[2:3]:
                late = h[2].output
            for _ in t.iter[3:4]:
                h[0].output[:] = h[0].output + late.mean()
                logits = model.logits.save()
            tokens = t.result.save()
        return [*each, logits, tokens]

    both(use)


def test_several_jobs_generate_together() -> None:
    jobs = [
        Graph(
            (Run("generate", (Invoke((tuple(ROW[:n]),)),), options={"max_new_tokens": 3}),),
            (read(0, BLOCK.format(n % 3)), save(1, 0)),
        )
        for n in (2, 4, 6)
    ]
    for job, found in zip(jobs, run(shards("gpt2"), jobs), strict=True):
        close(found, run(whole("gpt2"), [job])[0])


def test_a_generation_is_steered_each_step_by_what_earlier_runs_made() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.session():
            means = []
            for row in (ROW, ROW[::-1]):
                with model.trace(row):
                    means.append(h[1].output[:, -1].mean(0))
            steer = (means[0] - means[1]).save()
            with model.generate(ROW, max_new_tokens=3) as t:
                with t.all():
                    h[1].output[:, -1] += steer * 2
                tokens = t.result.save()
        return steer, tokens

    both(use)


def test_a_gradient_decides_what_a_later_shard_is_written() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW, batching="exclusive"):
            early = h[0].output
            with h[1].output.norm().backward():
                push = early.grad
            h[2].output[:] = h[2].output + push
            logits = model.logits.save()
        return [logits]

    both(use)


def test_a_value_meets_one_of_another_run_on_a_shard_that_has_nothing_else_to_do() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.session():
            with model.trace(ROW):
                late = h[2].output
            with model.trace(ROW):
                early = h[0].output
                h[2].output[:] = late + early
                end = model.logits.save()
        return [end]

    both(use)


def test_attached_values_come_to_their_shards() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        vector = torch.linspace(-1, 1, 64)
        with model.edit() as edited:
            h[2].output[:, -1] += vector
        with edited.trace(ROW):
            h[0].output[:, 0] = vector
            found = h[2].output.save()
        return [found]

    both(use)


def test_gradients_of_two_backwards_meet_on_a_shard() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW):
            first, last = h[0].output, h[2].output
            with model.logits[0, -1, 7].backward():
                early = first.grad
            with model.logits[0, -1, 9].backward():
                late = last.grad
            both_ways = (early.sum() + late.sum()).save()
            difference = (early - late).save()
        return both_ways, difference

    both(use, exact=False)


def test_a_shard_that_fails_at_the_beginning_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Node(0, "param", (BLOCK.format(1) + ".mlp.c_fc", "weight"))
    job = graph(weight, save(1, 0))
    on, begun = shards("gpt2"), Graphs._begun

    def broken(self: Graphs, told: Any) -> Any:
        begun(self, told)
        raise RuntimeError("no memory for it")

    monkeypatch.setattr(Graphs, "_begun", broken)
    errors = on.run([EngineJob(job, {}, Kept()), EngineJob(job, {}, Kept())])
    assert [type(error) for error in errors] == [InternalError] * 2
    assert parts(on) == 0


def miss_a_gradient(model: Any) -> None:
    """A job that fails after its backward."""
    with pytest.raises(NotReached, match="no gradient flows"), model.trace(ROW) as t:
        first, own = model.transformer.h[0].output, model.transformer.h[2].output * 2
        high = model.logits.mean() > 1e9
        value = t.cond(high, lambda: own * 3, lambda: own)
        loss = t.cond(high, lambda: value.sum(), lambda: model.logits.sum())
        with loss.backward():
            value.grad.save()
            first.grad.save()


@pytest.mark.parametrize("parts", [0, 3])
def test_a_gradient_that_does_not_come_is_an_error_wherever_its_value_came_from(parts: int) -> None:
    miss_a_gradient(language(parts))


def test_a_job_that_fails_after_its_backward_leaves_no_graph_on_any_shard() -> None:
    """Its error's frames hold the loss, and so torch's graph: a circle by way of that is never collected."""
    model = language(3)
    miss_a_gradient(model)
    gc.collect()
    split_: Any = shards("gpt2", 3).loaded.split
    for site, stop in split_.route._stops.items():
        split_.route._threads[site].run(lambda: None)
        assert not stop.station._kept and not stop._entries
    assert not split_.route._ways


def test_a_value_that_is_what_came_to_a_shard_is_watched_and_its_gradient_goes_on() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW) as t:
            first, middle, last = h[0].output, h[1].output, h[2].output
            value = t.cond(last.abs().max() > -1, lambda: middle, lambda: middle * 2)
            loss = (value * last).sum() + model.logits.sum()
            with loss.backward():
                late, early = value.grad.save(), first.grad.save()
        return late, early

    both(use, exact=False)


@pytest.mark.parametrize("parts", [0, 3])
def test_a_value_handed_on_has_a_gradient_of_its_own(parts: int) -> None:
    model = language(parts)
    h = model.transformer.h
    with model.trace(ROW) as t:
        first, last = h[0].output, h[2].output
        value = t.cond(last.abs().max() > -1, lambda: first, lambda: first * 2)
        loss = value.sum() * 3 + model.logits.sum()
        with loss.backward():
            own = value.grad.save()
            value.grad = value.grad * 2
            early = first.grad.save()
    assert torch.equal(own, torch.full_like(own, 3.0))
    with model.trace(ROW):
        first = h[0].output
        loss = first.sum() * 6 + model.logits.sum()
        with loss.backward():
            expected = first.grad.save()
    assert torch.allclose(early, expected, atol=1e-5)
