"""Reads, views, writes and saves in a block do what they do to real tensors in hooks written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpose import LanguageModel
from interpose.errors import BadArgument, OpFailed, WrongOrder
from models import tiny
from programs import Eager, Names, Step, program, take
from transformers import AutoModelForCausalLM

ROWS = [[5, 9, 33, 7], [81, 2, 14, 3]]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(str(tiny("gpt2")))


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny("gpt2")).eval()


def in_hooks(plain: Any, parts: list[list[Step]]) -> tuple[Eager, torch.Tensor]:
    eager = Eager()
    blocks = plain.transformer.h
    handles = [
        blocks[0].attn.register_forward_hook(lambda _, args, out: (eager.run(parts[0], out[0]), *out[1:])),
        blocks[1].ln_1.register_forward_pre_hook(lambda _, args: (eager.run(parts[1], args[0]), *args[1:])),
        blocks[1].register_forward_hook(lambda _, args, out: eager.run(parts[2], out)),
    ]
    try:
        with torch.no_grad():
            ids = torch.tensor(ROWS)
            return eager, plain(ids, attention_mask=torch.ones_like(ids)).logits
    finally:
        for handle in handles:
            handle.remove()


def in_a_trace(model: LanguageModel, parts: list[list[Step]]) -> tuple[Names, Any]:
    names = Names()
    blocks = model.transformer.h

    def attn(value: Any) -> None:
        blocks[0].attn.output[0] = value

    def norm(value: Any) -> None:
        blocks[1].ln_1.input = value

    def block(value: Any) -> None:
        blocks[1].output = value

    reads = [lambda: blocks[0].attn.output[0], lambda: blocks[1].ln_1.input, lambda: blocks[1].output[0]]
    with model.trace(ROWS):
        for steps, read, replace in zip(parts, reads, (attn, norm, block), strict=True):
            for step in steps:
                take(step, names, read, replace, lambda value: value.save())
        logits = model.output.save()
    return names, logits


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 14))
def test_programs_do_what_they_do_to_real_tensors(model: Any, plain: Any, seed: int, length: int) -> None:
    eager, expected = in_hooks(plain, [program(seed + part, length) for part in range(3)])
    names, logits = in_a_trace(model, eager.taken)
    for found, wanted in zip(names.saved, eager.names.saved, strict=True):
        torch.testing.assert_close(found.value, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(logits.value, expected, rtol=0, atol=0, equal_nan=True)


def test_a_reshape_that_is_a_view_sees_later_writes_and_one_that_copied_is_refused(model: Any) -> None:
    with model.trace(ROWS):
        hidden = model.transformer.h[1].output[0]
        flat, lines = hidden.reshape(8, 64), hidden.flatten(0, 1)
        hidden[:, -1] = 0
        seen, also = flat.save(), lines.save()
    real = torch.ones(2, 4, 64)
    view = real.reshape(8, 64)
    real[:, -1] = 0
    assert torch.equal(seen == 0, view == 0)
    assert torch.equal(also, seen)
    with pytest.raises(OpFailed, match="view"), model.trace(ROWS):
        hidden = model.transformer.h[1].output[0]
        turned = hidden.transpose(0, 1).reshape(8, 64)  # a copy: real tensors would keep the old value in it
        hidden[:, -1] = 0
        turned.save()
    with model.trace(ROWS):
        hidden = model.transformer.h[1].output[0]
        turned = hidden.transpose(0, 1).reshape(8, 64)
        kept = turned.save()
    assert kept.abs().min() > 0


def test_a_save_is_the_value_at_its_line(model: Any) -> None:
    block = model.transformer.h[1]
    with model.trace(ROWS):
        hidden = block.output[0]
        before = hidden.save()
        part = hidden[:, -1]
        hidden[:, -1] = 0
        after = hidden.save()
        through = part.save()
        block.output = hidden * 2
        old, new = hidden[...].save(), block.output.save()
    assert before[:, -1].abs().min() > 0
    assert torch.equal(through, torch.zeros_like(through))
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert torch.equal(after[:, -1], through)
    assert torch.equal(old, after)
    assert torch.equal(new, after * 2)


def test_writing_a_norm_input_leaves_the_residual(model: Any, plain: Any) -> None:
    block = model.transformer.h[1]
    with model.trace(ROWS):
        block.ln_1.input[:] = 0
        entered = block.input.save()
        output = block.output.save()
    zeroed = plain.transformer.h[1].ln_1.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    seen: dict[str, torch.Tensor] = {}
    watch = plain.transformer.h[1].register_forward_hook(
        lambda _, args, out: seen.update(input=args[0], output=out)
    )
    with torch.no_grad():
        plain(torch.tensor(ROWS))
    zeroed.remove(), watch.remove()
    assert entered.abs().min() > 0
    assert torch.equal(entered, seen["input"])
    assert torch.equal(output, seen["output"])


def test_an_old_name_of_a_replaced_point_is_read_and_no_longer_written(model: Any) -> None:
    with model.trace(ROWS):
        attn = model.transformer.h[0].attn
        old = attn.output[0]
        part = old[0]
        attn.output[0] = old * 0
        assert attn.output[0] is not old
        kept = part.save()
        with pytest.raises(BadArgument, match="replaced since"):
            old[:] = 1
        new = attn.output[0].save()
    assert kept.abs().max() > 0
    assert new.abs().max() == 0


def test_a_name_outlives_an_augmented_assignment(model: Any) -> None:
    block = model.transformer.h[0]
    with model.trace(ROWS):
        hidden = block.output
        first = hidden[...].save()
        block.output += 1
        block.output[0] *= 2
        block.output[0][:, 0] -= 1
        hidden[:, -1] = 0
        last = block.output.save()
    expected = (first + 1) * 2
    expected[:, 0] -= 1
    expected[:, -1] = 0
    assert torch.equal(last, expected)


def test_a_point_that_has_passed_is_not_written(model: Any) -> None:
    with model.trace(ROWS):
        late = model.transformer.h[1].output[0]
        with pytest.raises(WrongOrder):
            model.transformer.h[0].output[0][:] = late
        with pytest.raises(WrongOrder):
            model.transformer.h[0].output = late
        late.save()


def test_invokes_of_unequal_lengths_write_their_own_part(model: Any) -> None:
    rows = [[5, 9, 33, 7, 8, 1], [81, 2]]
    block = model.transformer.h[0]
    with model.trace() as tracer:
        with tracer.invoke(rows[0]):
            first = block.output[0]
        with tracer.invoke(rows[1]):
            second = block.output[0]
            before = second[...].save()
            block.output = second + 1
            second_now = block.output[0]
        first[:, -1] = second_now[:, -1]
        with tracer.invoke():
            whole = block.output.save()
            whole[:, :, 0] = 7
            last = block.output[0][...].save()
        one, two = first[...].save(), second_now[...].save()
    assert torch.equal(whole[1, -2:], before[0] + 1)
    assert torch.equal(whole[0, -1], (before + 1)[0, -1])
    assert (last[..., 0] == 7).all()
    assert torch.equal(last[..., 1:], whole[..., 1:])
    assert torch.equal(one, last[:1])
    assert torch.equal(two, last[1:, -2:])


def test_saved_values_do_not_share_memory_with_the_users(model: Any) -> None:
    given = torch.ones(2, 4, 64)
    with model.trace(ROWS):
        model.transformer.h[0].output = given
        saved = model.transformer.h[0].output.save()
        weight = model.lm_head.weight.save()
        wide = model.transformer.h[1].output[0][:1].expand(2, 4, 64).save()
    saved.zero_(), weight.zero_(), wide.zero_()
    assert given.min() == 1
    with model.trace(ROWS):
        logits = model.output.save()
    assert logits.abs().max() > 0


def test_models_that_write_over_their_values_change_no_save_and_no_tensor_of_the_users() -> None:
    """Falcon adds attention's output into the MLP's, in place."""
    falcon = LanguageModel(str(tiny("falcon")))
    stock = AutoModelForCausalLM.from_pretrained(tiny("falcon")).eval()
    seen: dict[str, torch.Tensor] = {}
    stock.transformer.h[0].mlp.register_forward_hook(lambda _, args, out: seen.update(mlp=out.clone()))
    with torch.no_grad():
        seen["logits"] = stock(torch.tensor(ROWS)).logits
    with falcon.trace(ROWS):
        point = falcon.transformer.h[0].mlp
        plain = point.output.save()
        logits = falcon.output.save()
    assert torch.equal(plain, seen["mlp"])
    assert torch.equal(logits, seen["logits"])
    given = seen["mlp"].clone()
    with falcon.trace(ROWS):
        falcon.transformer.h[0].mlp.output = given
        kept = falcon.transformer.h[0].mlp.output.save()
        logits = falcon.output.save()
    for tensor in (given, kept):
        assert torch.equal(tensor, seen["mlp"])
    assert torch.equal(logits, seen["logits"])
