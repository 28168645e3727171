"""Sessions: values between runs, runs that share forwards, generations among them; equal to the same by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoding import decode
from interpose import LanguageModel
from interpose.errors import DeferredError, IndexOutOfRange, InterposeError, NotSaved, WrongOrder
from models import tiny
from twins import close, run, same

GPT2 = "tiny-gpt2"
BLOCK = "transformer.h.1"
CLEAN, CORRUPTED = [5, 9, 33, 7], [8, 81, 2, 14]


def ids(row: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([row])}


@pytest.fixture(scope="module")
def local() -> Any:
    return LanguageModel(str(tiny("gpt2")))


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """The number of rows of each forward made inside."""
    model._model.eval()
    calls: list[int] = []
    handle = model._model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def test_patching_in_one_job(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    with model.session(**place.options):
        with model.trace(CLEAN):
            source = model.transformer.h[1].output[0]
            clean = model.output.save()
        with model.trace(CORRUPTED):
            model.transformer.h[1].output[0][:, -1] = source[:, -1]
            patched = model.output.save()
    taken = run(twin.model, ids(CLEAN))[BLOCK]

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, -1] = taken[:, -1]
        return hidden

    expected = run(twin.model, ids(CORRUPTED), {BLOCK: edit})[""]
    assert not torch.allclose(expected, run(twin.model, ids(CORRUPTED))[""])
    same(clean, run(twin.model, ids(CLEAN))[""])
    same(patched, expected)
    with pytest.raises(NotSaved):
        _ = source + 1


def test_a_sweep_in_one_job(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    found = {}
    with model.session(**place.options):
        with model.trace(CLEAN):
            sources = [block.output[0] for block in model.transformer.h]
        for layer in range(3):
            for position in range(4):
                with model.trace(CORRUPTED):
                    model.transformer.h[layer].output[0][:, position] = sources[layer][:, position]
                    found[layer, position] = model.output[0, -1].save()
    taken = run(twin.model, ids(CLEAN))
    plain = run(twin.model, ids(CORRUPTED))[""]
    for (layer, position), logits in found.items():
        path = f"transformer.h.{layer}"

        def edit(hidden: torch.Tensor, path: str = path, position: int = position) -> torch.Tensor:
            hidden = hidden.clone()
            hidden[:, position] = taken[path][:, position]
            return hidden

        expected = run(twin.model, ids(CORRUPTED), {path: edit})[""]
        assert not torch.equal(expected, plain)
        close(logits, expected[0, -1])


def test_runs_that_need_nothing_of_one_another_share_a_forward(local: Any) -> None:
    with forwards(local) as calls, local.session():
        with local.trace(CLEAN):
            source = local.transformer.h[1].output[0].save()
        with local.trace([3, 4]):
            other = local.output.save()
        for scale in (0.5, 2.0):
            with local.trace(CORRUPTED):
                local.transformer.h[1].output[0][:] = source * scale
                last = local.output.save()
        with local.trace(CLEAN):
            local.transformer.h[0].output[0][:, -1] = last[:, -1].mean()
            end = local.output.save()
    assert sorted(calls, reverse=True) == [2, 2, 1]
    assert calls == [2, 2, 1]
    assert end.shape == (1, 4, 400)
    with local.trace([3, 4]):
        alone = local.output.save()
    close(other, alone.value)


def test_values_of_several_runs_meet(place: Any, stock: Callable[..., Any]) -> None:
    """A steering vector from contrast prompts, used in a generation, all in one job."""
    model, twin = place.open(GPT2), stock(GPT2)
    positive, negative = [[5, 9, 33], [7, 12, 60]], [[8, 81, 2], [14, 3, 90]]
    with model.session(**place.options):
        means = []
        for rows in (positive, negative):
            with model.trace(rows):
                means.append(model.transformer.h[1].output[0][:, -1].mean(0))
        steer = (means[0] - means[1]).save()
        with model.generate(CLEAN, max_new_tokens=5, eos_token_id=-1) as tracer:
            with tracer.all():
                model.transformer.h[1].output[0][:, -1] += steer * 2
            tokens = tracer.result.save()
        with model.trace(CLEAN):
            before = model.output.save()

    def mean(rows: list[list[int]]) -> torch.Tensor:
        return run(twin.model, {"input_ids": torch.tensor(rows)})[BLOCK][:, -1].mean(0)

    vector = mean(positive) - mean(negative)
    close(steer, vector)

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, -1] += vector * 2
        return hidden

    expected = decode(twin.model, CLEAN, 5, {(step, BLOCK): edit for step in range(5)})
    assert not torch.equal(expected.tokens, decode(twin.model, CLEAN, 5).tokens)
    assert torch.equal(tokens, expected.tokens)
    same(before, run(twin.model, ids(CLEAN))[""])


def test_generated_tokens_go_on(place: Any, stock: Callable[..., Any]) -> None:
    """What a step of a generation held is used in a trace after it."""
    model, twin = place.open(GPT2), stock(GPT2)
    with model.session(**place.options):
        with model.generate(CLEAN, max_new_tokens=4, eos_token_id=-1) as tracer:
            with tracer.iter[3]:
                hidden = model.transformer.h[1].output[0][:, -1]
            tokens = tracer.result
            last = tokens[0, -1].save()
        with model.trace(CORRUPTED):
            model.transformer.h[1].output[0][:, 0] = hidden
            logits = model.output.save()
    decoded = decode(twin.model, CLEAN, 4)
    assert int(last) == int(decoded.tokens[0, -1])

    def edit(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 0] = decoded[3, BLOCK][:, -1]
        return value

    same(logits, run(twin.model, ids(CORRUPTED), {BLOCK: edit})[""])


def test_invokes_and_lists_in_a_session(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(GPT2), stock(GPT2)
    with model.session(**place.options) as session:
        kept = session.list()
        with model.trace() as tracer:
            for row in (CLEAN, CORRUPTED[:2]):
                with tracer.invoke(row):
                    kept.append(model.output[:, -1])
        with model.trace(CLEAN):
            kept.append(model.output[:, -1] - kept[0])
    for found, row in zip(kept, (CLEAN, CORRUPTED[:2]), strict=False):
        close(found, run(twin.model, ids(row))[""][:, -1])
    assert kept[2].abs().max() < 1e-4


# -- when it goes wrong ------------------------------------------------------------------------------------------


def test_a_run_that_fails_fails_the_job(place: Any) -> None:
    model = place.open(GPT2)
    saved: list[Any] = []
    with pytest.raises(IndexOutOfRange) as caught, model.session(**place.options):
        with model.trace(CLEAN):
            saved.append(model.output.save())
        with model.trace(CORRUPTED):
            wild = model.output.argmax(-1) + 10**6
            torch.nn.functional.embedding(wild, model.transformer.wte.weight).save()  # here
        with model.trace(CLEAN):
            saved.append(model.output.save())
    assert "# here" in str(caught.value)
    for value in saved:
        with pytest.raises(InterposeError):
            _ = value + 1


def test_an_error_in_one_trace_runs_nothing(local: Any) -> None:
    with forwards(local) as calls, pytest.raises(ZeroDivisionError), local.session():
        with local.trace(CLEAN):
            local.output.save()
        with local.trace(CLEAN):
            _ = 1 / 0
    assert not calls


def test_values_go_forward_only(local: Any) -> None:
    with local.session():
        with local.trace(CLEAN):
            early = local.transformer.h[0]
            late = local.transformer.h[2].output[0]
        with local.trace(CORRUPTED):
            early.output[0][:] = late  # a later run's early layer: fine
            logits = local.output.save()
        with local.trace(CORRUPTED), pytest.raises(WrongOrder, match="later in the forward"):
            early.output[0][:] = local.transformer.h[1].output[0]
    assert logits.shape == (1, 4, 400)


def test_what_a_session_is_not(local: Any) -> None:
    other = LanguageModel(str(tiny("llama")))
    with local.session():
        with pytest.raises(DeferredError, match="session"), local.session():
            pass
        with pytest.raises(DeferredError, match="own model"):
            other.trace(CLEAN)
        with local.trace(CLEAN) as tracer:
            kept = local.output.save()
            with pytest.raises(DeferredError, match="session"):
                _ = tracer.job
    assert kept.shape == (1, 4, 400)


def test_an_empty_session_runs_nothing(local: Any) -> None:
    with forwards(local) as calls:
        with local.session():
            pass
        with local.session(), local.trace(CLEAN):
            pass
    assert not calls
