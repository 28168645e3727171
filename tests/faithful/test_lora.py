"""Runs with an adapter against peft's own model; runs without one against a model that has none."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.graph.manifest import fingerprint
from lora import lora, stock
from models import tiny

ROW = [5, 9, 33, 7, 8]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"use_rslora": True}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
    "dora": ("llama", {"use_dora": True, "targets": ["v_proj", "o_proj", "lm_head"]}),
    "embedding": ("llama", {"targets": ["embed_tokens", "gate_proj"]}),
    "patterns": (
        "gpt2",
        {"rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_fc": 9}, "layers_to_transform": [0, 2]},
    ),
}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
OUT = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj"}


@cache
def theirs(kind: str) -> Any:
    arch, config = KINDS[kind]
    return stock(arch, lora(arch, **config), dtype=config.get("dtype", "float32"))


@cache
def ours(kind: str) -> LanguageModel:
    arch, config = KINDS[kind]
    dtype = config.get("dtype", "float32")
    adapters = {"a": lora(arch, **config), "b": lora(arch, 1, dtype=dtype)}
    return LanguageModel(str(tiny(arch, dtype=dtype)), adapters=adapters)


@torch.no_grad()
def by_hand(kind: str, path: str, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A module's output and the logits, with peft."""
    seen: list[torch.Tensor] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = theirs(kind).base_model.model.get_submodule(path).register_forward_hook(watch)
    try:
        return (theirs(kind)(torch.tensor([ids])).logits, *seen)[::-1]
    finally:
        handle.remove()


def submodule(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_pefts_bit_by_bit(kind: str) -> None:
    arch = KINDS[kind][0]
    model, path = ours(kind), f"{BLOCKS[arch]}.1.{OUT[arch]}"
    output, logits = by_hand(kind, path, ROW)
    with model.trace(ROW, adapter="a", batching="exclusive"):
        found = submodule(model, path).output.save()
        last = model.logits.save()
    assert torch.equal(found, output) and torch.equal(last, logits)
    with model.trace(ROW):
        plain = model.logits.save()
    assert float((plain - last).abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_an_adapter_it_is_the_model_bit_by_bit(kind: str) -> None:
    arch, config = KINDS[kind]
    expected = stock(arch, dtype=config.get("dtype", "float32"))(torch.tensor([ROW])).logits
    model = ours(kind)
    for batching in ("auto", "exclusive"):
        with model.trace(ROW, batching=batching):
            logits = model.logits.save()
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("arch", BLOCKS)
def test_the_tree_and_the_points_are_the_models(arch: str) -> None:
    plain, model = LanguageModel(str(tiny(arch))), ours(arch)
    assert model.manifest.modules == plain.manifest.modules
    assert model.manifest.named == plain.manifest.named
    assert all(not info.refused for info in model.adapters.values())
    assert model.manifest.revision == plain.manifest.revision
    assert fingerprint(model.manifest) != fingerprint(plain.manifest)
    assert (model.adapters["a"].rank == 3 and "c_attn" in model.adapters["a"].targets) or arch == "llama"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "dora"])
def test_named_points_hold_together(kind: str) -> None:
    model = ours(kind)
    with model.trace(ROW, adapter="a"):
        block = model.layers[1]
        pre, post = block.resid_pre.save(), block.resid_post.save()
        out, mlp_out = block.attn_out.save(), block.mlp_out.save()
        heads, pattern = block.head_out.save(), block.pattern.save()
    bias = 0 if kind != "gpt2" else theirs(kind).base_model.model.transformer.h[1].attn.c_proj.base_layer.bias
    torch.testing.assert_close(pre + out + mlp_out, post, rtol=0, atol=1e-4)
    torch.testing.assert_close(heads.sum(2) + bias, out, rtol=0, atol=1e-4)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "dora"])
@torch.no_grad()
def test_weights_are_those_the_run_multiplies_by(kind: str) -> None:
    arch = KINDS[kind][0]
    model, path = ours(kind), f"{BLOCKS[arch]}.0.{OUT[arch]}"
    with model.trace(ROW, adapter="a"):
        module = submodule(model, path)
        given, made, weight = module.input.save(), module.output.save(), module.weight.save()
        called = module(module.input).save()
    with model.trace(ROW):
        own = submodule(model, path).weight.save()
    bias = getattr(theirs(kind).base_model.model.get_submodule(path).base_layer, "bias", None)
    product = given @ (weight if arch == "gpt2" else weight.T) + (0 if bias is None else bias)
    torch.testing.assert_close(product, made, rtol=0, atol=1e-4)
    torch.testing.assert_close(called, made, rtol=0, atol=1e-5)
    assert torch.equal(own, theirs(kind).base_model.model.get_submodule(path).base_layer.weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_interventions_and_gradients(kind: str) -> None:
    arch = KINDS[kind][0]
    model, path = ours(kind), f"{BLOCKS[arch]}.1"
    grads: list[torch.Tensor] = []

    def steer(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = (hidden * 1.5).requires_grad_()
        hidden.register_hook(grads.append)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = theirs(kind).base_model.model.get_submodule(path).register_forward_hook(steer)
    try:
        expected = theirs(kind)(torch.tensor([ROW])).logits
        expected[0, -1].logsumexp(-1).backward()
    finally:
        handle.remove()
    with model.trace(ROW, adapter="a", batching="exclusive"):
        hidden = submodule(model, path).output
        hidden *= 1.5
        hidden.retain_grad()
        logits = model.logits.save()
        logits[0, -1].logsumexp(-1).backward()
    assert torch.equal(logits, expected.detach())
    torch.testing.assert_close(hidden.grad, grads[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generations(kind: str) -> None:
    model = ours(kind)
    ids = torch.tensor([ROW])
    expected = theirs(kind).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    with model.generate(ROW, max_new_tokens=6, adapter="a") as tracer:
        found = tracer.result.save()
    assert torch.equal(found, expected)
    with model.generate(ROW, max_new_tokens=6) as tracer:
        plain = tracer.result.save()
    assert not torch.equal(plain, found)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_session_of_several(kind: str) -> None:
    """Values flow between runs with different adapters, and each module call is of its own run's."""
    model = ours(kind)
    alone = {}
    for name in (None, "a", "b"):
        with model.trace(ROW, adapter=name):
            alone[name] = model.logits.save()
    with model.session(adapter="b"):
        with model.trace(ROW, adapter="a"):
            hidden = model.final_norm.save()
            first = model.logits.save()
        with model.trace(ROW):
            second = model.logits.save()
            apart = (hidden - model.final_norm).save()
    assert torch.equal(first, alone["a"]) and torch.equal(second, alone["b"])
    assert apart.abs().max() > 1e-3


def test_a_model_that_is_loaded_already(kind: str = "llama") -> None:
    module = copy.deepcopy(stock("llama"))
    model = LanguageModel(module)
    with model.trace(ROW):
        before = model.logits.save()
    model.load_adapter(lora("llama"), "a")
    with model.trace(ROW, adapter="a"):
        found = model.logits.save()
    with model.trace(ROW):
        after = model.logits.save()
    assert torch.equal(before, after)
    assert torch.equal(found, by_hand(kind, "model.layers.0", ROW)[1])
    assert not any("lora" in name for name, _ in module.named_modules())
    assert torch.equal(module(torch.tensor([ROW])).logits, before), "used by itself, it is the plain model"
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert torch.equal(other(torch.tensor([ROW])).logits, before)
