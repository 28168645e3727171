"""Standard names as they are written: lists of blocks, other spellings, replacing, gradients, generation."""

from __future__ import annotations

from functools import cache
from typing import Any

import by_hand
import pytest
import torch
from interpose.errors import BadArgument, IndexOutOfRange, UnknownPoint
from models import tiny
from recording import opened as ours
from torch import Tensor
from transformers import AutoModelForCausalLM
from twins import alive, close, same

ROW = [7, 21, 90, 33, 150, 61]
FAMILIES = ("gpt2", "llama", "olmo2", "opt", "bloom", "granite")


@cache
def stock(arch: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny(arch)).eval()


def lens(name: str, arch: str = "llama") -> Tensor:
    model = ours(arch)
    with model.trace(ROW):
        value = model.points[name].save()
    return value.value


def test_layers_are_the_blocks_whatever_the_family_calls_them() -> None:
    for arch in FAMILIES:
        model = ours(arch)
        assert len(model.layers) == 3 == len(list(model.layers)) == len(model.layers[:])
        assert [block._path for block in model.layers] == list(model.manifest.blocks)
        assert model.layers[-1]._path == model.manifest.blocks[-1]
        with pytest.raises(IndexOutOfRange, match="3 blocks"):
            model.layers[3]


def test_transformerlens_strings() -> None:
    model = ours("llama")
    with model.trace(ROW):
        block = model.layers[1]
        names = ("resid_pre", "resid_mid", "attn_out", "q", "v", "z", "pattern", "scores", "head_out", "mlp_post")
        own = {name: getattr(block, name).save() for name in names}
        turned = block.q_rot.save()
    spelled = ("hook_resid_pre", "hook_resid_mid", "hook_attn_out", "attn.hook_q", "attn.hook_v", "attn.hook_z")
    spelled += ("attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_result", "mlp.hook_post")
    for name, text in zip(names, spelled, strict=True):
        close(lens(f"blocks.1.{text}").clamp(min=-1e4), own[name].clamp(min=-1e4), 1e-5)
    assert torch.equal(lens("blocks.1.attn.hook_rot_q"), turned.transpose(1, 2)), "positions before heads"
    close(lens("blocks.1.q"), own["q"], 1e-5)
    assert torch.equal(lens("hook_pos_embed", "gpt2"), stock("gpt2").transformer.wpe.weight[None, : len(ROW)])


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("ln_final.hook_normalized", "before the norm's gain"),
        ("blocks.0.ln1.hook_scale", "norm's scale"),
        ("blocks.0.hook_mlp_in", "mlp_in after the norm"),
        ("blocks.0.attn.hook_nothing", "no point of TransformerLens"),
        ("blocks.7.hook_resid_pre", "has 3 blocks"),
        ("blocks.0.mlp.hook_expert_weights", "nothing is routed"),
        ("hook_pos_embed", "by rotation"),
    ],
)
def test_what_no_model_makes_is_refused_with_a_reason(text: str, advice: str) -> None:
    with pytest.raises(UnknownPoint, match=advice):
        lens(text)


def test_nnterp_accessors() -> None:
    model = ours("gpt2")
    with model.trace(ROW):
        pairs = [
            (model.layers_output[1].save(), model.transformer.h[1].output[0].save()),
            (model.layers_input[2].save(), model.transformer.h[1].output[0].save()),
            (model.attentions_output[0].save(), model.transformer.h[0].attn.output[0].save()),
            (model.mlps_output[0].save(), model.transformer.h[0].mlp.output.save()),
            (model.token_embeddings.save(), model.transformer.wte.output.save()),
            (model.project_on_vocab(model.layers_output[-1]).save(), model.logits.save()),
            (model.next_token_probs.save(), model.output[:, -1].softmax(-1).save()),
        ]
    with model.trace(ROW):
        model.layers_output[2] = model.layers_output[2] * 0
        zeroed = model.logits.save()
    for one, other in pairs:
        same(one, other)
    assert not torch.equal(zeroed, pairs[5][0])


def test_a_real_child_wins_and_what_it_hides_is_among_the_points() -> None:
    model = ours("llama")
    assert type(model.model.layers).__name__ == "Module"
    with model.trace(ROW):
        tap, named = model.layers[0].self_attn.v.save(), model.layers[0].points["v"].save()
    assert torch.equal(tap.transpose(1, 2), named)
    assert {"output", "resid_mid", "pattern"} <= set(model.layers[0].points)
    assert "resid_mid" in repr(model.layers[0]) and "stream" not in repr(model)


@pytest.mark.parametrize("arch", FAMILIES)
def test_replacing(arch: str) -> None:
    """An assignment replaces the value; names taken before keep the old one."""
    model = ours(arch)
    for name in ("q", "resid_mid", "attn_out", "head_out"):
        with model.trace(ROW):
            before = getattr(model.layers[1], name)
            old = before.save()
            setattr(model.layers[1], name, before * 0.5)
            kept, now, logits = before.save(), getattr(model.layers[1], name).save(), model.logits.save()
            with pytest.raises(BadArgument, match="replaced since"):
                before[:] = 0
        with model.trace(ROW):
            part = getattr(model.layers[1], name)
            part *= 0.5
            scaled = model.logits.save()
            setattr(model.layers[1], name, part)
        same(kept, old)
        close(now, old * 0.5, 1e-5)
        close(logits, scaled, 1e-5)


@pytest.mark.parametrize("arch", FAMILIES)
def test_one_name_is_written_and_others_keep_their_values(arch: str) -> None:
    model = ours(arch)
    with model.trace(ROW):
        clean = {name: getattr(model.layers[1], name).save() for name in ("attn_out", "mlp_out", "resid_post")}
    with model.trace(ROW):
        mid = model.layers[1].resid_mid
        mid[:] = mid.flip(-1)
        changed = mid.save()
        late = {name: getattr(model.layers[1], name).save() for name in ("attn_out", "mlp_out", "resid_post")}
    if arch != "bloom":  # there the attention module's own output is the residual
        same(late["attn_out"], clean["attn_out"])
    close(late["resid_post"], changed + late["mlp_out"])
    assert not torch.equal(late["mlp_out"], clean["mlp_out"])


@pytest.mark.parametrize("arch", FAMILIES)
def test_gradients(arch: str) -> None:
    """The gradient at the residual between attention and MLP counts both ways on from there."""
    blocks, inside, _ = by_hand.HANDS[arch]
    model = ours(arch)
    with model.trace(ROW):
        mid = model.layers[1].resid_mid.save()
        mid.retain_grad()
        model.logits[:, -1].square().sum().backward()
    twin = stock(arch)
    leaf: list[Tensor] = []

    def edit(value: Tensor) -> None:
        leaf.append(value.detach().clone().requires_grad_())
        value.copy_(leaf[0])

    path = f"{blocks}.{by_hand.BLOCK}.{inside['resid_mid'].module}"
    with by_hand.spotted(twin, path, inside["resid_mid"], edit):
        twin(torch.tensor([ROW])).logits[:, -1].square().sum().backward()
    alive(leaf[0].grad)
    close(mid.grad, leaf[0].grad.view_as(mid), 1e-4)
    with pytest.raises(BadArgument, match="no gradient comes to it"), model.trace(ROW):
        model.layers[1].head_out.retain_grad()
        model.logits.sum().backward()


def test_generation_and_steps() -> None:
    model = ours("llama")
    with model.generate(ROW, max_new_tokens=3) as tracer:
        for step in tracer.iter[:3]:
            value = model.layers[1].head_out
            assert value.shape == (1, 1 if step else len(ROW), 4, 64)
            value[:, -1, 0] = 0
        cut = tracer.result.save()
    with model.generate(ROW, max_new_tokens=3) as tracer:
        with tracer.all():
            model.layers[1].z[:, -1, 0] = 0
        direct = tracer.result.save()
    assert torch.equal(cut, direct)


def test_cached_by_pattern_and_edited() -> None:
    model = ours("gpt2")
    with model.edit() as edited:
        edited.layers[0].attn_out[:] = 0
    with edited.trace(ROW) as tracer:
        cache = tracer.cache("blocks.*.resid_mid")
    with model.trace(ROW):
        start = model.layers[0].resid_pre.save()
    assert list(cache) == [f"blocks.{index}.resid_mid" for index in range(3)]
    same(cache["blocks.0.resid_mid"], start)
