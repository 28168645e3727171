"""Edits that stay, caches, skipped modules, scans, logs, module calls and weights: against hooks by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interpose
import pytest
import torch
from decoding import decode
from interpose import torch as deferred_torch
from interpose.errors import BadArgument, NotReached, UnknownPoint, WrongOrder
from twins import alive, close, run, same

GPT2 = "tiny-gpt2"
ROW = [5, 9, 33, 7]
PATHS = [f"transformer.h.{index}" for index in range(3)]


@pytest.fixture
def model(place: Any) -> Any:
    return place.open(GPT2)


@pytest.fixture
def twin(stock: Callable[..., Any]) -> Any:
    return stock(GPT2)


def by_hand(twin: Any, edits: dict[str, Any] | None = None, row: list[int] = ROW) -> dict[str, torch.Tensor]:
    return run(twin.model, {"input_ids": torch.tensor([row])}, edits)


def flip(hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden.clone()
    hidden[:, -1] *= -1
    return hidden


# -- edits -------------------------------------------------------------------------------------------------------


def test_an_edit_comes_before_every_trace(place: Any, model: Any, twin: Any) -> None:
    vector = torch.linspace(-2, 2, 64)
    with model.edit() as edited:
        edited.transformer.h[0].output[0][:, -1] += vector
    vector.zero_()  # what was attached is what it was then
    with edited.trace(ROW, **place.options):
        hidden = edited.transformer.h[0].output[0].save()
        logits = edited.output.save()
    with model.trace(ROW, **place.options):
        untouched = model.output.save()

    def steer(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, -1] += torch.linspace(-2, 2, 64)
        return hidden

    expected = by_hand(twin, {PATHS[0]: steer})
    assert not torch.equal(expected[""], by_hand(twin)[""])
    same(hidden, expected[PATHS[0]])
    same(logits, expected[""])
    same(untouched, by_hand(twin)[""])


def test_edits_of_edits(place: Any, model: Any, twin: Any) -> None:
    with model.edit() as once:
        once.transformer.h[0].output[0][:, -1] *= -1
    with once.edit() as twice:
        twice.transformer.h[1].output[0][:, 0] = 0
    assert twice is not once is not model

    def erase(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, 0] = 0
        return hidden

    for chosen, edits in ((model, {}), (once, {PATHS[0]: flip}), (twice, {PATHS[0]: flip, PATHS[1]: erase})):
        with chosen.trace(ROW, **place.options):
            logits = chosen.output.save()
        same(logits, by_hand(twin, edits)[""])
    with twice.trace(ROW, **place.options):
        twice.transformer.h[1].output[0][:, 0] += 3  # a trace's own writes come after
        seen = twice.transformer.h[1].output[0].save()
    same(seen[:, 0], torch.full((1, 64), 3.0))


def test_an_edit_in_place_until_it_is_cleared(place: Any, model: Any, twin: Any) -> None:
    with model.edit(inplace=True) as edited:
        model.transformer.h[0].output[0][:, -1] *= -1
    assert edited is model
    try:
        with model.trace(ROW, **place.options):
            logits = model.output.save()
    finally:
        model.clear_edits()
    with model.trace(ROW, **place.options):
        after = model.output.save()
    same(logits, by_hand(twin, {PATHS[0]: flip})[""])
    same(after, by_hand(twin)[""])


def test_an_edit_at_every_step_of_a_generation(place: Any, model: Any, twin: Any) -> None:
    bias = torch.linspace(-2, 2, 64)
    with model.edit() as edited:
        edited.transformer.h[1].output[0][:, -1] += bias
    with edited.generate(ROW, max_new_tokens=5, eos_token_id=-1, **place.options) as tracer:
        seen = [edited.transformer.h[1].output[0].save() for _ in tracer.iter[:]]
        tokens = tracer.result.save()

    def add(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, -1] += bias
        return hidden

    expected = decode(twin.model, ROW, 5, {(step, PATHS[1]): add for step in range(5)})
    assert not torch.equal(expected.tokens, decode(twin.model, ROW, 5).tokens)
    assert torch.equal(tokens, expected.tokens)
    for step, hidden in enumerate(seen):
        same(hidden, expected[step, PATHS[1]])


def test_an_edit_is_for_every_prompt_and_run(place: Any, model: Any, twin: Any) -> None:
    with model.edit() as edited:
        edited.transformer.h[0].output[0][:, -1] *= -1
    with edited.session(**place.options):
        with edited.trace() as tracer:
            logits = []
            for row in (ROW, ROW[:2]):
                with tracer.invoke(row):
                    logits.append(edited.output.save())
        with edited.trace(ROW[:3]):
            logits.append(edited.output.save())
    for found, row in zip(logits, (ROW, ROW[:2], ROW[:3]), strict=True):
        close(found, by_hand(twin, {PATHS[0]: flip}, row)[""])


def test_an_edit_saves_nothing(model: Any) -> None:
    with pytest.raises(BadArgument, match="traces of the edited model"), model.edit() as edited:
        edited.transformer.h[0].output[0].save()


# -- cache, skip, stop -------------------------------------------------------------------------------------------


def test_a_cache_by_pattern(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        cache = tracer.cache("transformer.h.*.output", "transformer.h.1.mlp.*", model.transformer.ln_f)
        with pytest.raises(UnknownPoint, match="no hook point matches"):
            tracer.cache("transformer.*.output.nothing")
    expected = by_hand(twin)
    for path in PATHS:
        same(cache[f"{path}.output"][0] if isinstance(cache[f"{path}.output"], tuple) else cache[f"{path}.output"],
             expected[path])  # fmt: skip
    same(cache["transformer.ln_f.output"], expected["transformer.ln_f"])
    same(cache["transformer.h.1.mlp.output"], expected["transformer.h.1.mlp"])
    assert "transformer.h.0.mlp.output" not in cache


def test_a_cache_after_a_write_holds_what_was_written(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        model.transformer.h[0].output[0][:, -1] *= -1
        cache = tracer.cache("transformer.h.*.output")
    expected = by_hand(twin, {PATHS[0]: flip})
    assert not torch.equal(expected[PATHS[2]], by_hand(twin)[PATHS[2]])
    for path in PATHS:
        same(cache[f"{path}.output"], expected[path])


def test_skipping(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options):
        before = model.transformer.h[0].output[0]
        model.transformer.h[1].skip(before)
        out = model.transformer.h[1].output[0].save()
        logits = model.output.save()
        with pytest.raises(WrongOrder, match="skips"):
            _ = model.transformer.h[1].mlp.output
    seen = by_hand(twin)
    expected = by_hand(twin, {PATHS[1]: lambda _: seen[PATHS[0]]})[""]
    assert not torch.equal(expected, seen[""])
    same(out, seen[PATHS[0]])
    same(logits, expected)


@pytest.mark.parametrize("bodies", [True, False])
def test_skipping_at_later_steps(place: Any, model: Any, twin: Any, bodies: bool) -> None:
    block = model.transformer.h[1]
    with model.generate(ROW, max_new_tokens=4, eos_token_id=-1, **place.options) as tracer:
        if bodies:
            with tracer.iter[1:]:
                block.skip(model.transformer.h[0].output[0])
                with pytest.raises(WrongOrder, match="skips"):
                    _ = block.mlp.output
        else:
            for _ in tracer.iter[1:]:
                block.skip(model.transformer.h[0].output[0])
        first = block.mlp.output.save()
        tokens = tracer.result.save()
    seen: list[torch.Tensor] = []

    def skip(hidden: torch.Tensor) -> torch.Tensor:
        return seen[-1].clone()

    handle = twin.model.transformer.h[0].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        expected = decode(twin.model, ROW, 4, {(step, PATHS[1]): skip for step in (1, 2, 3)}).tokens
    finally:
        handle.remove()
    assert not torch.equal(expected, decode(twin.model, ROW, 4).tokens)
    assert torch.equal(tokens, expected)
    same(first, by_hand(twin)["transformer.h.1.mlp"])


def test_an_edit_that_skips(place: Any, model: Any, twin: Any) -> None:
    with model.edit() as edited:
        edited.transformer.h[1].skip(edited.transformer.h[0].output[0])
    with edited.trace(ROW, **place.options):
        with pytest.raises(WrongOrder, match="skips"):
            _ = edited.transformer.h[1].mlp.output
        hidden = edited.transformer.h[0].output[0]
        with edited.output[0, -1, 3].backward():
            gradient = hidden.grad.save()
        logits = edited.output.save()
    seen = by_hand(twin)
    same(logits, by_hand(twin, {PATHS[1]: lambda _: seen[PATHS[0]]})[""])
    leaf = seen[PATHS[0]].clone().requires_grad_()
    last = twin.model.transformer.h[2](leaf)
    end = last[0] if isinstance(last, tuple) else last
    twin.model.lm_head(twin.model.transformer.ln_f(end))[0, -1, 3].backward()
    close(gradient, leaf.grad, 1e-4)


def test_skipping_with_a_value_that_comes_too_late(place: Any, model: Any) -> None:
    with model.trace(ROW, **place.options):
        late = model.transformer.h[1].mlp.output
        with pytest.raises(WrongOrder, match="after it has begun"):
            model.transformer.h[1].skip(late)
        kept = late.save()
    alive(kept)


def test_stopping(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        hidden = model.transformer.h[0].output[0].save()
        tracer.stop()
        doubled = (hidden * 2).save()
        with pytest.raises(WrongOrder, match="stopped"):
            _ = model.transformer.h[1].output
    same(hidden, by_hand(twin)[PATHS[0]])
    assert torch.equal(doubled, hidden * 2)


# -- scan, log, keeping ------------------------------------------------------------------------------------------


def test_a_scan_runs_nothing(model: Any) -> None:
    with model.scan(ROW) as tracer:
        hidden = model.transformer.h[0].output[0].save()
        assert hidden.shape == (1, 4, 64)
        assert model.output.softmax(-1).topk(5).values.shape == (1, 4, 5)
        with pytest.raises(WrongOrder):
            model.transformer.h[0].output[0][:] = model.transformer.h[2].output[0]
        tracer.log(hidden)
    with pytest.raises(NotReached, match="scan"):
        _ = hidden + 1


def test_logs_are_printed(place: Any, model: Any, twin: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with model.trace(ROW, **place.options) as tracer:
        hidden = model.transformer.h[0].output[0]
        tracer.log("mean is", hidden.mean(), 3)
        tracer.log(hidden)
    printed = "".join(capfd.readouterr())
    mean = by_hand(twin)[PATHS[0]].mean()
    assert f"mean is {mean!r} 3" in printed
    assert "tensor[1, 4, 64]" in printed


def test_lists_and_containers(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        kept = tracer.list().save()
        for block in model.transformer.h:
            kept.append(block.output[0])
        kept.extend([model.output.sum()])
        held = interpose.save({"a": model.transformer.h[0].output[0], "b": [model.output, (model.output.mean(),)]})
        best = model.output.topk(3).save()
    expected = by_hand(twin)
    for found, path in zip(kept, PATHS, strict=False):
        same(found, expected[path])
    close(kept[3], expected[""].sum())
    same(held["a"], expected[PATHS[0]])
    same(held["b"][0], expected[""])
    close(held["b"][1][0], expected[""].mean())
    same(best.values, expected[""].topk(3).values)
    assert torch.equal(best.indices, expected[""].topk(3).indices)


def test_tensors_made_in_the_block(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options):
        mask = deferred_torch.zeros(4, 64)
        mask[:, :10] = 1
        noise = deferred_torch.arange(64) * 0.1
        model.transformer.h[0].output[0][:] = model.transformer.h[0].output[0] * mask + noise
        logits = model.output.save()
    mask = torch.zeros(4, 64)
    mask[:, :10] = 1
    expected = by_hand(twin, {PATHS[0]: lambda hidden: hidden * mask + torch.arange(64) * 0.1})[""]
    assert not torch.equal(expected, by_hand(twin)[""])
    close(logits, expected)


# -- modules called on values, weights -------------------------------------------------------------------------


def test_a_logit_lens(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options):
        lens = [model.lm_head(model.transformer.ln_f(block.output[0])).save() for block in model.transformer.h]
        norm = model.transformer.ln_f.output.save()
    seen = by_hand(twin)
    with torch.no_grad():
        for found, path in zip(lens, PATHS, strict=True):
            same(found, twin.model.lm_head(twin.model.transformer.ln_f(seen[path])))
    same(lens[-1], seen[""])
    same(norm, seen["transformer.ln_f"])


def test_a_called_module_is_not_seen_by_hook_points(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options):
        model.transformer.h[1].mlp.output[:] = 0
        called = model.transformer.h[1].mlp(model.transformer.h[0].output[0]).save()
    with torch.no_grad():
        expected = twin.model.transformer.h[1].mlp(by_hand(twin)[PATHS[0]])
    close(called, expected)


def test_weights_as_values(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options):
        direction = model.lm_head.weight[7] - model.lm_head.weight[9]
        score = (model.transformer.ln_f.output @ direction).save()
        bias = model.transformer.h[0].attn.c_attn.bias.save()
        with pytest.raises(BadArgument, match="clone"):
            model.transformer.wte.weight[0] = 9.0
        table = model.transformer.wte.weight.clone()
        table[0] = 9.0  # a value of the block: the model's own weight is untouched
        changed, logits = table[0].save(), model.output.save()
    seen, head = by_hand(twin), twin.model.lm_head.weight.detach()
    close(score, seen["transformer.ln_f"] @ (head[7] - head[9]))
    same(bias, twin.model.transformer.h[0].attn.c_attn.bias.detach())
    assert torch.equal(changed, torch.full((64,), 9.0))
    same(logits, seen[""])
    with model.trace(ROW, **place.options):
        again = model.transformer.wte.weight[0].save()
    same(again, twin.model.transformer.wte.weight[0].detach())
