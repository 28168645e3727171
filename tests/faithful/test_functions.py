"""Values at calls of functions inside a module's forward, against the same forward written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoding import decode
from interpose import LanguageModel
from interpose.errors import NotReached, UnknownPoint
from models import tiny
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from twins import alive, close, same

NAME = "tiny-llama"
PROMPT = "The capital of France is"
NORM = "model.layers.1.input_layernorm"
MLP = "model.layers.1.mlp"


def halved(value: Tensor) -> Tensor:
    new = value.clone()
    new[:, 2] *= 0.5
    return new


@contextmanager
def norm_by_hand(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """RMS norm in one place, its reciprocal root changed."""
    norm, caught = model.get_submodule(NORM), []

    def forward(hidden: Tensor) -> Tensor:
        scale = change(torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))
        caught.append(scale.clone())
        return norm.weight * (hidden * scale)

    norm.forward = forward
    try:
        yield caught
    finally:
        del norm.forward


def test_reading(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(NAME), stock(NAME)
    with model.trace(PROMPT, **place.options):
        call = model.model.layers[1].input_layernorm.functions.rsqrt[0]
        assert call.output.shape == (1, 8, 1)
        scale, summed = call.output.save(), call.input.save()
        gate, up = (value.save() for value in model.model.layers[1].mlp.source.mul_0.inputs[0])
        product = model.model.layers[1].mlp.source.mul_0.output.save()
    with norm_by_hand(twin.model, lambda value: value) as caught, torch.no_grad():
        twin.model(**twin.inputs(PROMPT))
    same(scale, caught[0])
    same(torch.rsqrt(summed), caught[0])
    same(gate * up, product)
    with model.trace(PROMPT, **place.options):
        same_value = model.model.layers[1].mlp_post.save()
    same(product, same_value)


@pytest.mark.parametrize("how", ["whole", "in place", "the sum that goes in"])
def test_replacing(place: Any, stock: Callable[..., Any], how: str) -> None:
    model, twin = place.open(NAME), stock(NAME)
    with model.trace(PROMPT, **place.options):
        call = model.model.layers[1].input_layernorm.functions.rsqrt[0]
        if how == "whole":
            new = call.output.clone()
            new[:, 2] *= 0.5
            call.output = new
        elif how == "in place":
            call.output[:, 2] *= 0.5
        else:
            call.input[:, 2] *= 4
        after = call.output.save()
        logits = model.logits.save()
    with norm_by_hand(twin.model, halved) as caught, torch.no_grad():
        expected = twin.model(**twin.inputs(PROMPT)).logits
    with torch.no_grad():
        assert not torch.equal(expected, twin.model(**twin.inputs(PROMPT)).logits)
    close(after, caught[0])
    (close if how == "the sum that goes in" else same)(logits, expected)


def test_beside_other_prompts(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(NAME), stock(NAME)
    with model.trace(**place.options) as tracer:
        with tracer.invoke("A quick brown fox jumps over the lazy dog"):
            model.model.layers[1].input_layernorm.functions.rsqrt[0].output[:] = 0
        with tracer.invoke(PROMPT):
            model.model.layers[1].input_layernorm.functions.rsqrt[0].output[:, 2] *= 0.5
            scale = model.model.layers[1].input_layernorm.functions.rsqrt[0].output.save()
            logits = model.logits.save()
    with norm_by_hand(twin.model, halved) as caught, torch.no_grad():
        expected = twin.model(**twin.inputs(PROMPT)).logits
    close(scale, caught[0])
    close(logits, expected)


def test_at_a_step_of_a_generation(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(NAME), stock(NAME)
    with model.generate(PROMPT, max_new_tokens=5, **place.options) as tracer:
        scales = []
        for step in tracer.iter[:]:
            call = model.model.layers[1].input_layernorm.source.rsqrt_0
            if step == 2:
                call.output[:] *= -3
            scales.append(call.output.save())
        tokens = tracer.result.save()
    calls = []

    def change(value: Tensor) -> Tensor:
        calls.append(value)
        return value * -3 if len(calls) == 3 else value

    ids = twin.inputs(PROMPT)["input_ids"][0].tolist()
    with norm_by_hand(twin.model, change) as caught:
        expected = decode(twin.model, ids, 5).tokens
    assert torch.equal(tokens, expected)
    assert not torch.equal(expected, decode(twin.model, ids, 5).tokens)
    assert len(caught) == len(scales) == 5
    for scale, wanted in zip(scales, caught, strict=True):
        same(scale, wanted)


def test_gradients(place: Any, stock: Callable[..., Any]) -> None:
    model, twin = place.open(NAME), stock(NAME)

    def run(*, doubled: bool) -> tuple[Tensor, Tensor]:
        with model.trace(PROMPT, **place.options):
            below = model.model.layers[0].output[0]
            product = model.model.layers[1].mlp.functions.mul[0].output
            with model.logits[0, -1].logsumexp(-1).backward():
                here = product.grad.save()
                if doubled:
                    product.grad = product.grad * 2
                deeper = below.grad.save()
        return here, deeper

    def by_hand(*, doubled: bool) -> tuple[Tensor, Tensor]:
        kept: dict[str, Tensor] = {}

        def watch(name: str, value: Tensor) -> None:
            if not value.requires_grad:
                value.requires_grad_()
            kept[name] = value
            value.retain_grad()

        down = twin.model.get_submodule(f"{MLP}.down_proj")
        first = twin.model.get_submodule("model.layers.0")

        def before(_: Any, args: Any) -> None:
            watch("product", args[0])
            if doubled:
                args[0].register_hook(lambda grad: grad * 2)

        handles = [
            first.register_forward_hook(lambda m, args, out: watch("below", out)),
            down.register_forward_pre_hook(before),
        ]
        try:
            twin.model(**twin.inputs(PROMPT)).logits[0, -1].logsumexp(-1).backward()
        finally:
            for handle in handles:
                handle.remove()
        grads = kept["product"].grad, kept["below"].grad
        assert grads[0] is not None and grads[1] is not None
        return grads[0] / (2 if doubled else 1), grads[1]

    for doubled in (False, True):
        for found, expected in zip(run(doubled=doubled), by_hand(doubled=doubled), strict=True):
            close(found, expected, 1e-4)
    assert not torch.allclose(by_hand(doubled=False)[1], by_hand(doubled=True)[1], rtol=1e-3)


def test_caches_edits_sessions_and_programs(place: Any) -> None:
    model = place.open(NAME)
    with model.trace(PROMPT, **place.options) as tracer:
        cache = tracer.cache("model.layers.*.mlp.mul_0.output")
    with model.trace(PROMPT, **place.options):
        posts = [layer.mlp_post.save() for layer in model.layers]
    assert len(cache) == 3
    for value, post in zip(cache.values(), posts, strict=True):
        same(value, post)
    with model.edit() as edited:
        edited.model.layers[1].mlp.functions.mul[0].output[:] *= 0.25
    with edited.trace(PROMPT, **place.options):
        changed = edited.logits.save()
    with model.session(**place.options):
        with model.trace(PROMPT):
            post = model.model.layers[1].mlp.functions.mul[0].output
        with model.trace(PROMPT) as tracer:
            model.model.layers[1].mlp.functions.mul[0].output = post * 0.25
            again = model.logits.save()
    same(again, changed)
    with model.trace(PROMPT, **place.options) as tracer:
        model.model.layers[1].mlp.functions.mul[0].output[:] *= 0.25
        tracer.name("logits", model.logits)
    same(tracer.graph.run(model, PROMPT, **place.options)["logits"], changed)
    moved = tracer.graph.run(model, PROMPT, layers={1: 2}, **place.options)["logits"]
    assert not torch.allclose(moved, changed)


# -- what needs a model of its own, here alone -------------------------------------------------------------------


@pytest.fixture(scope="module")
def eager_falcon() -> tuple[LanguageModel, Any]:
    stock = AutoModelForCausalLM.from_pretrained(tiny("falcon"), attn_implementation="eager").eval()
    return LanguageModel(AutoModelForCausalLM.from_pretrained(tiny("falcon"), attn_implementation="eager")), stock


def test_what_a_function_writes_over_is_what_the_model_goes_on_with(
    eager_falcon: tuple[LanguageModel, Any],
) -> None:
    """Falcon divides its scores in place: what is put there must be where the model's own name looks."""
    model, stock = eager_falcon
    row = [7, 21, 90, 33, 150]
    module = model.transformer.h[1].self_attention
    with model.trace(row):
        module.functions.div[0].output[:, :, :, 0] += 3.0
        scores = module.functions.div[0].output.save()
        logits = model.logits.save()
    with model.trace(row):
        module.functions.div[0].input[:, :, :, 0] += 3.0 * 4  # the root of its heads' width
        again = model.logits.save()
    caught: list[Tensor] = []
    softmax = functional.softmax

    def soft(value: Tensor, dim: int, dtype: Any = None) -> Tensor:
        caught.append(value)
        new = value.clone()
        new[:, :, :, 0] += 3.0
        return softmax(new if len(caught) == 2 else value, dim=dim, dtype=dtype)

    functional.softmax = soft
    try:
        with torch.no_grad():
            expected = stock(torch.tensor([row])).logits
    finally:
        functional.softmax = softmax
    with torch.no_grad():
        assert not torch.allclose(expected, stock(torch.tensor([row])).logits)
    alive(scores)
    close(logits, expected)
    close(again, expected)


def test_a_mixture_reads_its_routers_own_steps() -> None:
    model = LanguageModel(str(tiny("mixtral")))
    with model.trace([7, 21, 90, 33, 150]):
        gate = model.model.layers[1].mlp.gate.functions
        chances, (top, ids) = gate.softmax[0].output.save(), (part.save() for part in gate.topk[0].output)
        total = gate.sum[0].output.save()
        weights = model.layers[1].expert_weights.save()
    assert torch.equal(chances.topk(2).indices, ids)
    close(chances.sum(-1), torch.ones(5), 1e-6)
    close(top / total, weights[0], 1e-6)


def test_what_is_called_only_in_the_first_forward_is_nowhere_later() -> None:
    model = LanguageModel(str(tiny("mamba")))
    with model.generate([7, 21, 90], max_new_tokens=2) as tracer:
        first = model.backbone.layers[1].mixer.functions.conv1d[0].output.save()
    alive(first)
    with pytest.raises(NotReached), model.generate([7, 21, 90], max_new_tokens=2) as tracer, tracer.iter[1]:
        model.backbone.layers[1].mixer.functions.conv1d[0].output.save()


def test_a_fused_kernel_is_no_softmax(place: Any) -> None:
    model = place.open("tiny-gpt2")
    with pytest.raises(UnknownPoint, match="scores, pattern"), model.trace(PROMPT, **place.options):
        model.transformer.h[0].attn.functions.softmax[0].output.save()


def test_a_later_write_into_the_same_memory_is_not_seen(place: Any) -> None:
    """The sum at the end of a block's attention half is the memory that resid_mid is written in."""
    model = place.open("tiny-gpt2")
    with model.trace([5, 6, 7], **place.options):
        block = model.transformer.h[0]
        summed = block.source.add_0.output.save()
        before = block.resid_mid.clone().save()
        block.resid_mid[:, -1] = 0
        after = block.resid_mid.save()
    alive(before)
    same(summed, before)
    assert not after[:, -1].any()
