"""What families do differently, each said once and shown on numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from at_points import ROW, inputs, ours, stock
from interpose.errors import UnknownPoint
from models import tiny
from torch import Tensor
from twins import close, same


def values(arch: str, *names: str, block: int = 1) -> list[Tensor]:
    model = ours(arch)
    with model.trace(ROW):
        found = [getattr(model.layers[block], name).save() for name in names]
    return [value.value for value in found]


def weights(arch: str, path: str) -> Any:
    return stock(tiny(arch), arch, False).get_submodule(path)


GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "granite", "olmo2", "phi3")


@pytest.mark.parametrize("arch", GROUPED)
def test_keys_and_values_have_fewer_heads(arch: str) -> None:
    q, k, v = values(arch, "q", "k", "v")
    assert (q.shape[2], k.shape[2], v.shape[2]) == (4, 2, 2)
    pattern, z = values(arch, "pattern", "z")
    # Two queries share each value; "values have as many heads as keys".
    close(z.transpose(1, 2), pattern @ v.transpose(1, 2).repeat_interleave(2, 1))


def test_falcon_has_one_head_of_keys_and_values() -> None:
    assert [value.shape[2] for value in values("falcon", "q", "k", "v")] == [4, 1, 1]


def test_gpt2_packs_queries_keys_and_values() -> None:
    attn_in, q, k, v = values("gpt2", "attn_in", "q", "k", "v")
    packed = weights("gpt2", "transformer.h.1.attn.c_attn")(attn_in)
    same(torch.cat([value.flatten(2) for value in (q, k, v)], -1), packed)


@pytest.mark.parametrize(
    ("arch", "out", "down"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"),
        ("llama", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        ("opt", "model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.fc2"),
        ("gemma3", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
    ],
)
def test_z_and_mlp_post_are_what_the_projections_take(arch: str, out: str, down: str) -> None:
    z, attn_raw, post, mlp_raw = values(arch, "z", "attn_out_raw", "mlp_post", "mlp_out_raw")
    same(weights(arch, out)(z.flatten(2)), attn_raw)
    same(weights(arch, down)(post), mlp_raw)


def test_mlp_pre_is_the_up_or_the_gate_projections_output() -> None:
    mlp_in, pre, post = values("gpt2", "mlp_in", "mlp_pre", "mlp_post")
    same(weights("gpt2", "transformer.h.1.mlp.c_fc")(mlp_in), pre)
    close(torch.nn.functional.gelu(pre, approximate="tanh"), post)
    mlp_in, pre, linear, post = values("llama", "mlp_in", "mlp_pre", "mlp_pre_linear", "mlp_post")
    same(weights("llama", "model.layers.1.mlp.gate_proj")(mlp_in), pre)
    same(weights("llama", "model.layers.1.mlp.up_proj")(mlp_in), linear)
    close(torch.nn.functional.silu(pre) * linear, post)


SANDWICHED = ("gemma2", "gemma3")


@pytest.mark.parametrize("arch", SANDWICHED)
def test_sandwich_norms_give_what_is_made_and_what_is_added(arch: str) -> None:
    pre, raw, added, mid = values(arch, "resid_pre", "attn_out_raw", "attn_out", "resid_mid")
    same(weights(arch, "model.layers.1.post_attention_layernorm")(raw), added)
    same(pre + added, mid)
    assert float((raw - added).abs().max()) > 0.1
    mid, mlp_in, raw, added, post = values(arch, "resid_mid", "mlp_in", "mlp_out_raw", "mlp_out", "resid_post")
    same(weights(arch, "model.layers.1.pre_feedforward_layernorm")(mid), mlp_in)
    same(weights(arch, "model.layers.1.post_feedforward_layernorm")(raw), added)
    same(mid + added, post)


@pytest.mark.parametrize("arch", ["neox", "falcon", "phi"])
def test_parallel_blocks_have_no_middle(arch: str) -> None:
    with pytest.raises(UnknownPoint, match=r"has no resid_mid: .*nothing lies between"), ours(arch).trace(ROW):
        _ = ours(arch).layers[1].resid_mid
    pre, attn, mlp, post = values(arch, "resid_pre", "attn_out", "mlp_out", "resid_post")
    close(pre + attn + mlp, post)


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_have_no_single_hidden_layer(arch: str) -> None:
    for name in ("mlp_pre", "mlp_pre_linear", "mlp_post"):
        with pytest.raises(UnknownPoint, match=rf"has no {name}: .*expert"), ours(arch).trace(ROW):
            getattr(ours(arch).layers[1], name)


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_routers_outputs_are_named_by_what_they_are(arch: str) -> None:
    mlp_in, logits, chances, ids = values(arch, "mlp_in", "router_logits", "expert_weights", "expert_ids")
    close(mlp_in @ weights(arch, "model.layers.1.mlp.gate").weight.T, logits)
    found, order = logits.softmax(-1).topk(2)
    assert torch.equal(order, ids) and ids.dtype == torch.int64
    normal = arch != "qwen2_moe"  # its config doesn't ask for it
    close(found / found.sum(-1, keepdim=True) if normal else found, chances)


@pytest.mark.parametrize("arch", ["bloom", "mpt"])
def test_what_a_sublayer_adds_is_told_apart_from_the_sum_it_returns(arch: str) -> None:
    pre, attn, mid, mlp, post = values(arch, "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    close(pre + attn, mid)
    close(mid + mlp, post)
    (within,) = outputs(arch, {"bloom": ["transformer.h.1.mlp"], "mpt": ["transformer.blocks.1.ffn"]}[arch])
    same(within, post)
    assert float((within - mlp).abs().max()) > 0.1


@torch.no_grad()
def outputs(arch: str, paths: Sequence[str]) -> list[Tensor]:
    model, found, handles = stock(tiny(arch), arch, False), {}, []
    for path in paths:
        keep = lambda module, args, output, path=path: found.update({path: output})  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(keep))
    try:
        model(**inputs(arch, [ROW]))
    finally:
        for handle in handles:
            handle.remove()
    return [found[path][0] if isinstance(found[path], tuple) else found[path] for path in paths]


def test_granite_scales_what_it_adds() -> None:
    pre, raw, added, mid = values("granite", "resid_pre", "attn_out_raw", "attn_out", "resid_mid")
    close(added, raw * 0.3)
    close(pre + added, mid)
    mid, raw, added, post = values("granite", "resid_mid", "mlp_out_raw", "mlp_out", "resid_post")
    close(added, raw * 0.3)
    close(mid + added, post)


def test_olmo2_normalises_afterwards() -> None:
    pre, attn_in, raw, added, mid, mlp_in = values(
        "olmo2", "resid_pre", "attn_in", "attn_out_raw", "attn_out", "resid_mid", "mlp_in"
    )
    same(attn_in, pre)
    same(mlp_in, mid)
    same(weights("olmo2", "model.layers.1.post_attention_layernorm")(raw), added)


def test_a_norms_output_is_after_its_gain() -> None:
    """TransformerLens's `hook_normalized` is before it, which the model never makes."""
    mid, mlp_in = values("llama", "resid_mid", "mlp_in")
    norm = weights("llama", "model.layers.1.post_attention_layernorm")
    before = mid * torch.rsqrt(mid.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    close(before * norm.weight, mlp_in)
    assert float((before - mlp_in).abs().max()) > 0.1
    with pytest.raises(UnknownPoint, match="before the norm's gain"), ours("llama").trace(ROW):
        _ = ours("llama").points["ln_final.hook_normalized"]


@pytest.mark.parametrize("arch", ["gemma2", "granite", "bloom"])
def test_transformerlens_hook_attn_out_is_the_contribution(arch: str) -> None:
    model = ours(arch)
    with model.trace(ROW):
        spelled = model.points["blocks.1.hook_attn_out"].save()
        mlp = model.points["blocks.1.hook_mlp_out"].save()
        pre, post = model.layers[1].resid_pre.save(), model.layers[1].resid_post.save()
    close(pre + spelled + mlp, post.value)


BOUND = {"float32": 2e-6, "bfloat16": 3e-2, "float16": 4e-3}
"""How far attention's eager form moves a tiny model's logits from its fused one, relative and by norm: at most."""


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_fused_and_eager_differ(arch: str, dtype: str) -> None:
    """Whoever looks at the pattern gets the eager form's logits: the same up to rounding."""
    from interpose import LanguageModel

    model = LanguageModel(str(tiny(arch, dtype=dtype)))
    with model.trace(ROW):
        fused = model.logits.save()
    with model.trace(ROW):
        model.layers[1].pattern.save()
        eager = model.logits.save()
    apart = float((fused.float() - eager.float()).norm() / fused.float().norm())
    assert 0 < apart < BOUND[dtype]
