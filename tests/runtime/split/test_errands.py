"""What a module elsewhere makes of a block's value is written in that very block, as on the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import InterposeError, JobCancelled, LimitExceeded, OpFailed, WrongOrder
from interpose.graph.limits import UNLIMITED
from interpose.graph.model import Graph, Node, Point
from interpose.graph.values import Ref
from interpose.runtime.engine import EngineJob
from interpose.runtime.split.calling import Owned
from test_engine_isolation import BLOCK, LOGITS, Kept, close, graph, random_job, read, run, save
from test_graphs import ROW, both, language, parts, shards, watched, whole


@contextmanager
def asked() -> Iterator[Counter[tuple[str, str]]]:
    """(errand, path) -> how often some site did it for another."""
    seen = Counter[tuple[str, str]]()

    def noting(name: str) -> Callable[[Owned, Any], Any]:
        do = getattr(Owned, f"_{name}")

        def noted(self: Owned, request: Any) -> Any:
            seen[name, request["path"]] += 1
            return do(self, request)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("call", "parameter"):
            patch.setattr(Owned, f"_{name}", noting(name))
        yield seen


def lens(model: LanguageModel, value: Any) -> Any:
    """How sure the model would be of its next token, by position."""
    return model.lm_head(model.transformer.ln_f(value)).softmax(-1).amax(-1, keepdim=True)


def steered(model: LanguageModel) -> Sequence[Any]:
    h = model.transformer.h
    with model.trace(ROW):
        sure = lens(model, h[1].mlp.output)
        h[1].output[:] = h[1].output + sure * 3
        early = h[0].mlp(h[2].input)
        h[2].mlp.output[:] = h[2].mlp.output - early
        logits = model.logits.save()
        sure.save()
    return sure, logits


def test_a_lens_steers_the_block_it_looks_at() -> None:
    with asked() as seen:
        both(steered)
    assert seen == {("call", "transformer.ln_f"): 1, ("call", "lm_head"): 1, ("call", "transformer.h.0.mlp"): 1}


def test_it_decides_what_the_block_is_written() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h, saved = model.transformer.h, []
        for least in (0.0, 2.0):
            with model.trace(ROW) as t:
                unsure = lens(model, h[1].attn.output[0])[0, -1, 0] > least

                def then() -> None:
                    h[1].output[:, -1] += h[2].mlp.c_proj.weight[0] + model.transformer.wte.weight[3]

                t.cond(unsure, then, lambda: None)
                saved.append(model.logits.save())
        return saved

    both(use)


def test_a_loop_asks_at_every_turn() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW) as t:
            value = t.loop(3, lambda _, x: model.transformer.ln_f(x) + h[2].mlp(x), h[0].mlp.output)
            h[0].output[:] = value
            logits = model.logits.save()
        return [logits]

    with asked() as seen:
        both(use)
    assert seen == {("call", "transformer.ln_f"): 3, ("call", "transformer.h.2.mlp"): 3}


def test_a_generation_asks_at_every_step() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.generate([ROW, ROW[:3]], max_new_tokens=4) as t:
            with t.all():
                h[1].output[:] = h[1].output + lens(model, h[1].mlp.output) * 2
                each = h[2].output[:, -1].save()
            tokens = t.result.save()
        return [*each, tokens]

    both(use)


def test_gradients_come_by_what_was_asked_for() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW):
            first, inner = h[0].output, h[1].mlp.output
            sure = lens(model, inner)
            h[1].output[:] = h[1].output * sure + h[2].mlp(inner)
            later = h[2].output
            grads = []
            for loss in (model.logits[0, -1, 7], later.square().sum() + sure.sum()):
                with loss.backward():
                    grads += [first.grad.save(), inner.grad.save(), sure.grad.save()]
        return grads

    both(use, exact=False)


def test_a_gradient_that_was_asked_for_is_replaced() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW):
            first, inner = h[0].output, h[1].mlp.output
            normal = model.transformer.ln_f(inner)
            h[1].output[:] = h[1].output + normal
            with model.logits[0, -1, 7].backward():
                normal.grad = normal.grad * 2
                early = first.grad.save()
        return [early]

    both(use, exact=False)


def steering(block: int, scale: float, first: int = 0) -> list[Node]:
    """The head's norm of what a block's mlp returns, written into that block."""
    path = BLOCK.format(block)
    return [
        replace(read(first, path), point=Point(f"{path}.mlp", "output")),
        Node(first + 1, "call", ("transformer.ln_f", Ref(first)), invoke=0),
        Node(first + 2, "mul", (Ref(first + 1), scale), invoke=0),
        Node(first + 3, "write", ((), ..., Ref(first + 2)), point=Point(path, "output"), invoke=0),
    ]


def jobs() -> list[Graph]:
    return [
        graph(*steering(0, 0.5), replace(LOGITS, id=4), save(5, 4)),
        random_job(3, whole("gpt2").manifest),
        graph(*steering(1, 2.0), *steering(2, 0.1, 4), replace(LOGITS, id=8), save(9, 8)),
    ]


def test_jobs_that_share_a_forward_each_ask_for_themselves() -> None:
    with asked() as seen:
        found = run(shards("gpt2"), jobs())
    assert seen["call", "transformer.ln_f"] >= 3
    for one, job in zip(found, jobs(), strict=True):
        close(one, run(whole("gpt2"), [job])[0])
    assert parts(shards("gpt2")) == 0


def test_later_shards_are_not_called_where_nobody_needs_them() -> None:
    job = graph(*steering(1, 2.0), read(4, BLOCK.format(1)), save(5, 4))
    with watched(shards("gpt2")) as seen:
        (found,) = run(shards("gpt2"), [job])
    assert [site for site, _ in seen] == [2]
    close(found, run(whole("gpt2"), [job])[0])


@pytest.mark.parametrize("patience", range(4))
def test_a_job_that_asks_is_cancelled(patience: int) -> None:
    (error,) = shards("gpt2").run([EngineJob(jobs()[2], {}, Kept(patience))])
    assert error is None or isinstance(error, JobCancelled)
    assert patience or error is not None
    assert parts(shards("gpt2")) == 0


def failed(model: LanguageModel, use: Callable[[LanguageModel, Any], None]) -> InterposeError:
    with pytest.raises(InterposeError) as info, model.trace(ROW) as t:
        use(model, t)
    return info.value


@pytest.mark.parametrize("count", [0, 3])
def test_what_fails_elsewhere_fails_at_its_line(count: int) -> None:
    def use(model: LanguageModel, t: Any) -> None:
        wrong = model.lm_head(model.transformer.h[1].mlp.output.double())
        model.transformer.h[1].output[:, -1] += wrong.sum()
        model.logits.save()

    error = failed(language(count), use)
    assert isinstance(error, OpFailed)
    assert error.op == "call"
    assert __file__ in str(error.source)
    if count:
        assert parts(shards("gpt2")) == 0


def test_one_that_fails_elsewhere_fails_alone() -> None:
    sinks = [Kept() for _ in range(3)]
    limits = replace(UNLIMITED, tokens=2)  # more positions than a module that is asked may be called on
    bad = graph(
        *steering(1, 2.0)[:1],
        Node(1, "call", (BLOCK.format(0) + ".mlp", Ref(0)), invoke=0),
        replace(steering(1, 1.0)[3], id=2, args=((), ..., Ref(1))),
        replace(LOGITS, id=3),
        save(4, 3),
    )
    errors = shards("gpt2").run(
        [
            EngineJob(jobs()[0], {}, sinks[0]),
            EngineJob(bad, {}, sinks[1], limits=limits),
            EngineJob(jobs()[2], {}, sinks[2]),
        ]
    )
    assert errors[0] is errors[2] is None
    assert isinstance(errors[1], LimitExceeded)
    for at in (0, 2):
        close(sinks[at], run(whole("gpt2"), [jobs()[at]])[0])
    assert parts(shards("gpt2")) == 0


def test_what_a_backward_makes_in_the_middle_of_a_block_is_refused_at_its_line() -> None:
    def use(model: LanguageModel, t: Any) -> None:
        h = model.transformer.h
        inner = h[1].mlp.output
        with inner.square().sum().backward():
            push = inner.grad
        h[1].output[:] = h[1].output + push
        model.logits.save()

    error = failed(language(3), use)
    assert isinstance(error, WrongOrder)
    assert "several shards" in error.message
    assert error.op == "write"


def test_a_weight_is_asked_for_once_in_a_generation() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.generate(ROW, max_new_tokens=4) as t:
            with t.all():
                h[0].output[:] = h[0].output + h[2].mlp.c_proj.weight[1]
                h[1].output[:] = h[1].output + h[1].mlp.c_proj.weight[1] + model.transformer.wte.weight[4]
                weights = h[2].mlp.c_proj.weight[0].save()
            tokens = t.result.save()
        return [*weights, tokens]

    with asked() as seen:
        both(use)
    assert not seen, "each is sent from where it is, before the first step"


def test_a_module_elsewhere_that_hands_on_what_it_is_given() -> None:
    def use(model: LanguageModel) -> Sequence[Any]:
        h = model.transformer.h
        with model.trace(ROW):
            same = model.transformer.drop(h[1].mlp.output)
            h[1].output[:] = h[1].output + same * 2
            logits = model.logits.save()
        return [logits, torch.zeros(1)]

    both(use)
