"""Named values taken and changed by hand: for every architecture, the modules and arithmetic a reader would write.

Nothing here knows of manifests: these tables are the second opinion.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Cut = Callable[[Tensor], Tensor]
Edit = Callable[[Tensor], None]

BLOCK = 1
"""The block looked at."""

TAPS = ("q_rot", "k_rot", "scores", "pattern")


@dataclass(frozen=True)
class Spot:
    """A tensor a module takes or returns, and a view of it.

    `side`: "stream" is a module's input changed in its own memory, as code between two modules would.
    `flat`: rows and positions are one dimension there.
    """

    module: str
    side: Literal["out", "in", "stream"]
    cut: Cut = lambda value: value
    at: int = 0
    flat: bool = False

    def seen(self, value: Tensor, rows: int) -> Tensor:
        return self.cut(value.unflatten(0, (rows, -1)) if self.flat else value)


def heads(count: int, width: int) -> Cut:
    return lambda value: value.unflatten(-1, (count, width))


def part(start: int, stop: int, count: int, width: int) -> Cut:
    return lambda value: value[..., start:stop].unflatten(-1, (count, width))


def third(which: int, count: int, width: int) -> Cut:
    return lambda value: value.unflatten(-1, (count, 3, width))[..., which, :]


def span(start: int | None, stop: int | None) -> Cut:
    return lambda value: value[..., start:stop]


def llama(width: int = 16, kv: int = 2, attn: str = "self_attn", **changes: Spot) -> dict[str, Spot]:
    return {
        "resid_pre": Spot("", "in"),
        "attn_in": Spot(attn, "in"),
        "q": Spot(f"{attn}.q_proj", "out", heads(4, width)),
        "k": Spot(f"{attn}.k_proj", "out", heads(kv, width)),
        "v": Spot(f"{attn}.v_proj", "out", heads(kv, width)),
        "z": Spot(f"{attn}.o_proj", "in", heads(4, width)),
        "attn_out_raw": Spot(attn, "out"),
        "attn_out": Spot(attn, "out"),
        "resid_mid": Spot("post_attention_layernorm", "stream"),
        "mlp_in": Spot("mlp", "in"),
        "mlp_pre": Spot("mlp.gate_proj", "out"),
        "mlp_pre_linear": Spot("mlp.up_proj", "out"),
        "mlp_post": Spot("mlp.down_proj", "in"),
        "mlp_out_raw": Spot("mlp", "out"),
        "mlp_out": Spot("mlp", "out"),
        "resid_post": Spot("", "out"),
        **changes,
    }


def gemma() -> dict[str, Spot]:
    return llama(
        width=24,
        attn_out=Spot("post_attention_layernorm", "out"),
        resid_mid=Spot("pre_feedforward_layernorm", "stream"),
        mlp_out=Spot("post_feedforward_layernorm", "out"),
    )


def moe(width: int = 16) -> dict[str, Spot]:
    gone = ("mlp_pre", "mlp_pre_linear", "mlp_post")
    routed = {name: Spot("mlp.gate", "out", at=at, flat=True) for at, name in enumerate(ROUTES)}
    return {name: spot for name, spot in llama(width).items() if name not in gone} | routed


ROUTES = ("router_logits", "expert_weights", "expert_ids")


def packed(
    attn: str, qkv: str, out: str, cuts: list[Cut], mlp: str, up: str, down: str, mid: str
) -> dict[str, Spot]:
    """Families with one projection for queries, keys and values, and an MLP without a gate."""
    found = llama(kv=4, attn=attn, resid_mid=Spot(mid, "stream"))
    found |= {name: Spot(f"{attn}.{qkv}", "out", cut) for name, cut in zip("qkv", cuts, strict=True)}
    del found["mlp_pre_linear"]
    return found | {
        "z": Spot(f"{attn}.{out}", "in", heads(4, 16)),
        "mlp_in": Spot(mlp or up, "in"),
        "mlp_pre": Spot(f"{mlp}.{up}".strip("."), "out"),
        "mlp_post": Spot(f"{mlp}.{down}".strip("."), "in"),
        "mlp_out_raw": Spot(mlp or down, "out"),
        "mlp_out": Spot(mlp or down, "out"),
    }


def without(found: dict[str, Spot], *names: str) -> dict[str, Spot]:
    return {name: spot for name, spot in found.items() if name not in names}


THIRDS = [part(64 * which, 64 * which + 64, 4, 16) for which in range(3)]
BY_HEAD = [third(which, 4, 16) for which in range(3)]
FALCON = [part(0, 64, 4, 16), part(64, 80, 1, 16), part(80, 96, 1, 16)]


def opt() -> dict[str, Spot]:
    found = packed("self_attn", "", "out_proj", BY_HEAD, "", "fc1", "fc2", "final_layer_norm")
    flat = ("resid_mid", "mlp_in", "mlp_pre", "mlp_post", "mlp_out_raw", "mlp_out")
    found |= {name: replace(found[name], flat=True) for name in flat}
    return found | {name: Spot(f"self_attn.{name}_proj", "out", heads(4, 16)) for name in "qkv"}


def bloom() -> dict[str, Spot]:
    found = packed(
        "self_attention", "query_key_value", "dense", BY_HEAD, "mlp", "dense_h_to_4h", "dense_4h_to_h", ""
    )
    inside = {name: Spot("self_attention.dense", "out") for name in ("attn_out", "attn_out_raw")}
    inside |= {name: Spot("mlp.dense_4h_to_h", "out") for name in ("mlp_out", "mlp_out_raw")}
    return found | inside | {"resid_mid": Spot("self_attention", "out")}


def mpt() -> dict[str, Spot]:
    found = packed("attn", "Wqkv", "out_proj", THIRDS, "ffn", "up_proj", "down_proj", "norm_2")
    return found | {name: Spot("ffn.down_proj", "out") for name in ("mlp_out", "mlp_out_raw")}


def bert() -> dict[str, Spot]:
    found = packed("attention.self", "", "", BY_HEAD, "", "intermediate.dense", "output.dense", "")
    found |= {
        n: Spot(f"attention.self.{m}", "out", heads(4, 16))
        for n, m in zip("qkv", ("query", "key", "value"), strict=True)
    }
    return found | {
        "z": Spot("attention.output.dense", "in", heads(4, 16)),
        "attn_out": Spot("attention.output.dense", "out"),
        "attn_out_raw": Spot("attention.output.dense", "out"),
        "resid_mid": Spot("attention.output.LayerNorm", "in"),
    }


def phi() -> dict[str, Spot]:
    found = packed("self_attn", "", "dense", BY_HEAD, "mlp", "fc1", "fc2", "")
    return without(found, "resid_mid") | {n: Spot(f"self_attn.{n}_proj", "out", heads(4, 16)) for n in "qkv"}


def phi3() -> dict[str, Spot]:
    cuts = (part(0, 64, 4, 16), part(64, 96, 2, 16), part(96, 128, 2, 16))
    found = llama(**{name: Spot("self_attn.qkv_proj", "out", cut) for name, cut in zip("qkv", cuts, strict=True)})
    return found | {
        "mlp_pre": Spot("mlp.gate_up_proj", "out", span(None, 112)),
        "mlp_pre_linear": Spot("mlp.gate_up_proj", "out", span(112, None)),
    }


def olmo2() -> dict[str, Spot]:
    return llama(
        attn_out=Spot("post_attention_layernorm", "out"),
        resid_mid=Spot("mlp", "stream"),
        mlp_out=Spot("post_feedforward_layernorm", "out"),
    )


_NEOX = ("query_key_value", "dense", BY_HEAD, "mlp", "dense_h_to_4h", "dense_4h_to_h", "")

HANDS: dict[str, tuple[str, dict[str, Spot], dict[str, Spot]]] = {
    "gpt2": (
        "transformer.h",
        packed("attn", "c_attn", "c_proj", THIRDS, "mlp", "c_fc", "c_proj", "ln_2"),
        {
            "embed": Spot("transformer.wte", "out"),
            "pos_embed": Spot("transformer.wpe", "out"),
            "final_norm": Spot("transformer.ln_f", "out"),
        },
    ),
    **{
        name: (
            "model.layers",
            spots,
            {"embed": Spot("model.embed_tokens", "out"), "final_norm": Spot("model.norm", "out")},
        )
        for name, spots in {
            "llama": llama(),
            "mistral": llama(),
            "qwen2": llama(),
            "qwen3": llama(24),
            "granite": llama(),
            "olmo2": olmo2(),
            "phi3": phi3(),
            "gemma2": gemma(),
            "gemma3": gemma(),
            "mixtral": moe(),
            "qwen2_moe": moe(),
            "qwen3_moe": moe(24),
        }.items()
    },
    "phi": (
        "model.layers",
        phi(),
        {"embed": Spot("model.embed_tokens", "out"), "final_norm": Spot("model.final_layernorm", "out")},
    ),
    "neox": (
        "gpt_neox.layers",
        without(packed("attention", *_NEOX), "resid_mid"),
        {"embed": Spot("gpt_neox.embed_in", "out"), "final_norm": Spot("gpt_neox.final_layer_norm", "out")},
    ),
    "falcon": (
        "transformer.h",
        without(packed("self_attention", *_NEOX[:2], FALCON, *_NEOX[3:]), "resid_mid"),
        {"embed": Spot("transformer.word_embeddings", "out"), "final_norm": Spot("transformer.ln_f", "out")},
    ),
    "bloom": (
        "transformer.h",
        bloom(),
        {"embed": Spot("transformer.word_embeddings", "out"), "final_norm": Spot("transformer.ln_f", "out")},
    ),
    "mpt": (
        "transformer.blocks",
        mpt(),
        {"embed": Spot("transformer.wte", "out"), "final_norm": Spot("transformer.norm_f", "out")},
    ),
    "opt": (
        "model.decoder.layers",
        opt(),
        {
            "embed": Spot("model.decoder.embed_tokens", "out"),
            "pos_embed": Spot("model.decoder.embed_positions", "out"),
            "final_norm": Spot("model.decoder.final_layer_norm", "out"),
        },
    ),
    "bert": (
        "bert.encoder.layer",
        bert(),
        {
            "embed": Spot("bert.embeddings.word_embeddings", "out"),
            "pos_embed": Spot("bert.embeddings.position_embeddings", "out"),
        },
    ),
    "mamba": (
        "backbone.layers",
        {"resid_pre": Spot("", "in"), "resid_post": Spot("", "out")},
        {"embed": Spot("backbone.embeddings", "out"), "final_norm": Spot("backbone.norm_f", "out")},
    ),
}
"""Architecture -> list of blocks, what lies in a block, what lies in the model."""


@contextmanager
def spotted(
    model: nn.Module, path: str, spot: Spot, edit: Edit | None = None, rows: int = 1
) -> Iterator[list[Tensor]]:
    """Hook one spot: its value is caught at each forward, after the edit if there is one."""
    caught: list[Tensor] = []

    def change(value: Tensor) -> Tensor:
        new = value if spot.side == "stream" or edit is None else value.clone()
        if edit is not None:
            edit(spot.seen(new, rows))
        caught.append(spot.seen(new, rows).clone())
        return new

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return change(output)
        items = list(output)
        items[spot.at] = change(items[spot.at])
        return tuple(items)

    module = model.get_submodule(path)
    if spot.side == "out":
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield caught
    finally:
        handle.remove()


@contextmanager
def answered(model: nn.Module, edit: Edit | None = None) -> Iterator[list[Tensor]]:
    """The whole model's logits."""
    caught: list[Tensor] = []

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits.clone()
        if edit is not None:
            edit(output.logits)
        caught.append(output.logits.clone())
        return output

    handle = model.register_forward_hook(after)
    try:
        yield caught
    finally:
        handle.remove()


@contextmanager
def tapped(attention: nn.Module, name: str, edit: Edit | None = None) -> Iterator[list[Tensor]]:
    """Attention computed by hand in one module of an eager model, one of its inner values caught or changed."""
    home = sys.modules[type(attention).__module__]
    stock = home.eager_attention_forward  # type: ignore[attr-defined]
    caught: list[Tensor] = []

    def change(here: str, value: Tensor) -> Tensor:
        if here != name:
            return value
        if edit is not None:
            value = value.clone()
            edit(value)
        caught.append(value.clone())
        return value

    def by_hand(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if module is not attention:
            return stock(module, query, key, value, mask, **kwargs)
        query, key = change("q_rot", query), change("k_rot", key)
        shared = query.shape[1] // key.shape[1]
        # Copies where there is nothing to repeat would lie otherwise in memory, which changes last bits.
        keys, values = (each if shared == 1 else each.repeat_interleave(shared, 1) for each in (key, value))
        scale = kwargs.get("scaling")
        scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if kwargs.get("softcap") is not None:
            scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
        scores = change("scores", scores if mask is None else scores + mask)
        pattern = change("pattern", scores.float().softmax(-1).to(query.dtype))
        return (pattern @ values).transpose(1, 2).contiguous(), pattern

    home.eager_attention_forward = by_hand  # type: ignore[attr-defined]
    try:
        yield caught
    finally:
        home.eager_attention_forward = stock  # type: ignore[attr-defined]


SOFTMAX = ("bloom", "mpt")
"""Families that call softmax in their attention's own forward; Falcon calls the fused attention there."""


@contextmanager
def called(attention: nn.Module, name: str, arch: str, edit: Edit | None = None) -> Iterator[list[Tensor]]:
    """One of the inner values of an attention that calls torch's functions itself, caught or changed.

    Torch's function is another one while that module's forward runs.
    """
    caught: list[Tensor] = []

    def change(here: str, value: Tensor) -> Tensor:
        if here != name:
            return value
        value = value.clone()
        if edit is not None:
            edit(value)
        caught.append(value.clone())
        return value

    softmax, fused = functional.softmax, functional.scaled_dot_product_attention

    def soft(value: Tensor, dim: int, dtype: Any = None) -> Tensor:
        return change("pattern", softmax(change("scores", value), dim=dim, dtype=dtype))

    def written_out(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, **kwargs: Any) -> Tensor:
        query, key = change("q_rot", query), change("k_rot", key)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        pattern = change("pattern", softmax(change("scores", scores), -1))
        return pattern @ value

    def enter(*_: Any) -> None:
        functional.softmax = soft if arch in SOFTMAX else softmax
        functional.scaled_dot_product_attention = fused if arch in SOFTMAX else written_out

    def leave(*_: Any) -> None:
        functional.softmax, functional.scaled_dot_product_attention = softmax, fused

    handles = [attention.register_forward_pre_hook(enter), attention.register_forward_hook(leave)]
    try:
        yield caught
    finally:
        leave()
        for handle in handles:
            handle.remove()


@contextmanager
def split_by_head(out: nn.Module, z: Cut, edit: Edit | None = None) -> Iterator[list[Tensor]]:
    """What each head adds to an output projection's result, one product a head."""
    caught: list[Tensor] = []

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        value, weight = z(args[0]), module.weight.T if isinstance(module, nn.Linear) else module.weight
        width = value.shape[-1]
        parts = [value[:, :, h] @ weight[h * width : (h + 1) * width] for h in range(value.shape[2])]
        before = torch.stack(parts, 2)
        new = before.clone()
        if edit is not None:
            edit(new)
        caught.append(new)
        return output + (new - before).sum(2)

    handle = out.register_forward_hook(after)
    try:
        yield caught
    finally:
        handle.remove()


@contextmanager
def rerouted(gate: nn.Module, edit: Edit, rows: int = 1) -> Iterator[list[Tensor]]:
    """A router that decides on changed logits."""
    caught: list[Tensor] = []

    def after(gate: Any, args: Any, output: Any) -> Any:
        logits = output[0].clone()
        apart = logits.unflatten(0, (rows, -1))
        edit(apart)
        caught.append(apart)
        weights, ids = logits.float().softmax(-1).topk(gate.top_k)
        if getattr(gate, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(output[1].dtype), ids

    handle = gate.register_forward_hook(after)
    try:
        yield caught
    finally:
        handle.remove()


def scaled(edit: Edit, factor: float) -> Edit:
    """The edit of a value that the model makes only after this one, by a factor."""

    def change(value: Tensor) -> None:
        product = value * factor
        edit(product)
        value.copy_(product / factor)

    return change
