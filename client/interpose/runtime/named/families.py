"""Where each family of models keeps its values: one entry a family, names of modules within a block.

Nothing here is believed: `verify` checks every name on numbers. A new family is one more entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

Packing: TypeAlias = Literal["apart", "thirds", "by head", "falcon"]
"""How queries, keys and values come: from three projections; from one as [q | k | v]; from one as
[heads, (q, k, v), width]; from one as Falcon's config says."""


def never(config: Any) -> bool:
    return False


def always(config: Any) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """Modules of one family, relative to a block unless said otherwise; "" where the family has no such module.

    Attributes:
        types: `model_type`s of configs it is meant for; others come to it by structure.
        attn: the attention module; `out` its output projection.
        qkv: the one projection that makes queries, keys and values, if one does; else q, k, v are three.
        gate_up: the one projection that makes both inputs of a gated MLP's product, if one does.
        pre, linear, down: the MLP's projections; `linear` only in gated ones.
        attn_norm, mlp_norm: norms before the two; attn_post, mlp_post: norms after, within the residual branch.
        mid: the module that is first given the residual between attention and MLP, and how it lies there:
            "stream" (the block holds on to it too), "inputs" (it alone takes it), "output" (it made it).
        router: of mixtures of experts, in place of the MLP's projections.
        parallel: whether a config says that attention and MLP read the same residual.
        adds: modules that add the residual inside themselves.
        resid_norm: norms through which each sum goes on, where blocks normalise after adding.
        multiplier: the config's factor on both contributions.
        embed_norm, pos_embed, final_norm: relative to the module that holds the blocks' list.
        embed_scale, logits_scale, logits_cap: the config's figures for these.
        alibi: attention adds a slope over key positions.
        scores, pattern: within an attention module that can't be looked into otherwise, the call of a function or
            the module where these are.
        says: why whole groups of names don't exist.
    """

    name: str
    types: tuple[str, ...]
    attn: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    packing: Packing = "apart"
    out: str = "self_attn.o_proj"
    attn_norm: tuple[str, ...] = ("input_layernorm",)
    attn_post: str = ""
    mid: str = "post_attention_layernorm"
    mid_as: Literal["stream", "inputs", "output"] = "stream"
    mlp: str = "mlp"
    mlp_norm: tuple[str, ...] = ("post_attention_layernorm",)
    mlp_post: str = ""
    gate_up: str = ""
    pre: str = "mlp.gate_proj"
    linear: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: tuple[str, ...] = ("mlp.gate", "mlp.router")
    parallel: Callable[[Any], bool] = never
    adds: tuple[str, ...] = ()
    resid_norm: tuple[str, str] = ("", "")
    multiplier: str = "residual_multiplier"
    embed_norm: str = ""
    pos_embed: str = ""
    final_norm: str = "norm"
    embed_scale: str = "embedding_multiplier"
    logits_scale: str = "logits_scaling"
    logits_cap: str = "final_logit_softcapping"
    alibi: bool = False
    scores: str = ""
    pattern: str = ""
    says: dict[str, str] = field(default_factory=dict)


LLAMA = Family(
    "llama",
    (
        *("llama", "mistral", "qwen2", "qwen3", "olmo", "granite", "smollm3", "gemma", "stablelm"),
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
    ),
)
"""Also every family without an entry that is built like it."""

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    types=("gemma2", "gemma3_text", "gemma3"),
    attn_post="post_attention_layernorm",
    mid="pre_feedforward_layernorm",
    mlp_norm=("pre_feedforward_layernorm",),
    mlp_post="post_feedforward_layernorm",
)

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    types=("olmo2", "olmo3"),
    attn_norm=(),
    attn_post="post_attention_layernorm",
    mid="mlp",
    mlp_norm=(),
    mlp_post="post_feedforward_layernorm",
)

PHI3 = replace(
    LLAMA, name="phi3", types=("phi3",), qkv="self_attn.qkv_proj", packing="thirds", gate_up="mlp.gate_up_proj"
)

GPT2 = Family(
    "gpt2",
    ("gpt2", "gpt_bigcode"),
    attn="attn",
    qkv="attn.c_attn",
    packing="thirds",
    out="attn.c_proj",
    attn_norm=("ln_1",),
    mid="ln_2",
    mlp_norm=("ln_2",),
    pre="mlp.c_fc",
    linear="",
    down="mlp.c_proj",
    pos_embed="wpe",
    final_norm="ln_f",
)

PHI = replace(
    LLAMA,
    name="phi",
    types=("phi",),
    out="self_attn.dense",
    mid="",
    mlp_norm=("input_layernorm",),
    pre="mlp.fc1",
    linear="",
    down="mlp.fc2",
    parallel=always,
    final_norm="final_layernorm",
)

COHERE = replace(
    LLAMA,
    name="cohere",
    types=("cohere", "cohere2"),
    mid="",
    mlp_norm=("input_layernorm",),
    parallel=always,
    logits_scale="logit_scale",
)

NEOX = Family(
    "neox",
    ("gpt_neox",),
    attn="attention",
    qkv="attention.query_key_value",
    packing="by head",
    out="attention.dense",
    pre="mlp.dense_h_to_4h",
    linear="",
    down="mlp.dense_4h_to_h",
    parallel=lambda config: bool(config.use_parallel_residual),
    final_norm="final_layer_norm",
)

FALCON = replace(
    NEOX,
    name="falcon",
    types=("falcon",),
    attn="self_attention",
    qkv="self_attention.query_key_value",
    packing="falcon",
    out="self_attention.dense",
    attn_norm=("ln_attn", "input_layernorm"),
    mlp_norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
    parallel=lambda config: bool(config.parallel_attn or config.new_decoder_architecture),
    final_norm="ln_f",
)

BLOOM = replace(
    NEOX,
    name="bloom",
    types=("bloom",),
    attn="self_attention",
    qkv="self_attention.query_key_value",
    out="self_attention.dense",
    mid="self_attention",
    mid_as="output",
    parallel=never,
    adds=("self_attention", "mlp"),
    embed_norm="word_embeddings_layernorm",
    final_norm="ln_f",
    alibi=True,
    scores="softmax_0.inputs",
    pattern="attention_dropout",
)

MPT = Family(
    "mpt",
    ("mpt",),
    attn="attn",
    qkv="attn.Wqkv",
    packing="thirds",
    out="attn.out_proj",
    attn_norm=("norm_1",),
    mid="norm_2",
    mlp="ffn",
    mlp_norm=("norm_2",),
    pre="ffn.up_proj",
    linear="",
    down="ffn.down_proj",
    adds=("ffn",),
    final_norm="norm_f",
    alibi=True,
    scores="softmax_0.inputs",
    pattern="dropout_0.output",
)

OPT = replace(
    LLAMA,
    name="opt",
    types=("opt",),
    out="self_attn.out_proj",
    attn_norm=("self_attn_layer_norm",),
    mid="final_layer_norm",
    mlp="",
    mlp_norm=("final_layer_norm",),
    pre="fc1",
    linear="",
    down="fc2",
    pos_embed="embed_positions",
    final_norm="final_layer_norm",
)

BERT = Family(
    "bert",
    ("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    attn="attention.self",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    out="attention.output.dense",
    attn_norm=(),
    mid="attention.output.LayerNorm",
    mid_as="inputs",
    mlp="",
    mlp_norm=(),
    pre="intermediate.dense",
    linear="",
    down="output.dense",
    resid_norm=("attention.output.LayerNorm", "output.LayerNorm"),
    pos_embed="embeddings.position_embeddings",
    embed_norm="embeddings.LayerNorm",
    final_norm="",
    says={"final_norm": "its last block's output is normalised already; read resid_post"},
)

_CLASS = "its positions are one parameter of its embeddings, added to patches and class token at once"

VIT = replace(
    LLAMA,
    name="vit",
    types=("vit", "deit"),
    attn="attention",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.o_proj",
    attn_norm=("layernorm_before",),
    mid="layernorm_after",
    mlp_norm=("layernorm_after",),
    pre="mlp.fc1",
    linear="",
    down="mlp.fc2",
    final_norm="layernorm",
    says={"pos_embed": _CLASS},
)

CLIP = replace(
    LLAMA,
    name="clip",
    types=("clip_text_model", "siglip_text_model"),
    out="self_attn.out_proj",
    attn_norm=("layer_norm1",),
    mid="layer_norm2",
    mlp_norm=("layer_norm2",),
    pre="mlp.fc1",
    linear="",
    down="mlp.fc2",
    pos_embed="embeddings.position_embedding",
    final_norm="final_layer_norm",
)

CLIP_VISION = replace(
    CLIP,
    name="clip_vision",
    types=("clip_vision_model", "siglip_vision_model"),
    pos_embed="",
    final_norm="",
    says={
        "pos_embed": "its table of positions is looked up once for all images; read its module",
        "final_norm": "its last norm sees the first position alone in some models of the family; read its module",
    },
)

_MIXER = "this family has no attention and no MLP: each block is one state-space mixer"

MAMBA = Family(
    "mamba",
    ("mamba", "mamba2", "falcon_mamba"),
    attn="",
    q="",
    k="",
    v="",
    out="",
    attn_norm=("norm",),
    mid="",
    mlp="",
    mlp_norm=(),
    pre="",
    linear="",
    down="",
    final_norm="norm_f",
    says={"attention": _MIXER, "mlp": _MIXER},
)

FAMILIES = (
    LLAMA,
    GEMMA2,
    OLMO2,
    PHI3,
    GPT2,
    PHI,
    COHERE,
    NEOX,
    FALCON,
    BLOOM,
    MPT,
    OPT,
    BERT,
    VIT,
    CLIP,
    CLIP_VISION,
    MAMBA,
)


def find(kind: str, has: Callable[[str], bool]) -> Family | None:
    """The family of a config's `model_type`, or one whose modules a block has, the most telling first.

    Args:
        has: whether a block holds a module of this name.
    """
    named = next((family for family in FAMILIES if kind in family.types), None)
    if named is not None:
        return named
    fitting = [family for family in FAMILIES if family.out and all(map(has, _modules(family)))]
    return max(fitting, key=lambda family: len(_modules(family)), default=None)


def _modules(family: Family) -> set[str]:
    qkv = (family.qkv,) if family.qkv else (family.q, family.k, family.v)
    pre = (family.gate_up,) if family.gate_up else (family.pre, family.linear)
    norms = (*family.attn_norm[-1:], *family.mlp_norm[-1:], family.attn_post, family.mlp_post)
    return {name for name in (*qkv, *pre, family.out, family.down, family.mid, *norms) if name}
