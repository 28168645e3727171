"""What a family's entry claims is offered only if it holds: entries with a mistake are found out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from interpose.errors import InvalidGraph, UnknownPoint
from interpose.graph.limits import UNLIMITED
from interpose.graph.manifest import Manifest, decode_manifest, encode_manifest
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.named import decode_named, encode_named
from interpose.graph.validate import validate
from interpose.runtime.loading import load
from interpose.runtime.named import families, settle
from interpose.runtime.named.families import BLOOM, GEMMA2, GPT2, LLAMA, NEOX, OLMO2, PHI, Family
from models import ARCHITECTURES, tiny


def settled(monkeypatch: pytest.MonkeyPatch, arch: str, family: Family | None) -> Manifest:
    """The manifest as it would be, were this the architecture's entry."""
    monkeypatch.setattr("interpose.runtime.named.settling.find", lambda *_: family)
    return load(tiny(arch)).manifest


MISTAKES = {
    "packed by head": ("gpt2", replace(GPT2, packing="by head"), {"q", "k", "v"}),
    "packed in thirds": ("neox", replace(NEOX, packing="thirds"), {"q", "k", "v"}),
    "keys for values": ("llama", replace(LLAMA, k="self_attn.v_proj", v="self_attn.k_proj"), {"k", "v"}),
    "gate for linear": (
        "llama",
        replace(LLAMA, pre="mlp.up_proj", linear="mlp.gate_proj"),
        {"mlp_pre", "mlp_post"},
    ),
    "no factor": ("granite", replace(LLAMA, multiplier=""), {"attn_out", "mlp_out"}),
    "before the norm": ("gemma2", replace(GEMMA2, attn_post="", mlp_post=""), {"attn_out", "mlp_out"}),
    "a norm's input alone": ("llama", replace(LLAMA, mid_as="inputs"), {"resid_mid"}),
    "normalised first": ("olmo2", replace(OLMO2, attn_norm=("post_attention_layernorm",)), {"attn_in"}),
    "one after the other": ("phi", replace(PHI, mid="mlp", parallel=families.never), {"resid_mid"}),
    "the residual inside": ("bloom", replace(BLOOM, adds=()), {"attn_out", "mlp_out"}),
    "another norm": ("gpt2", replace(GPT2, final_norm="h.0.ln_1"), {"final_norm"}),
    "no slopes": ("bloom", replace(BLOOM, alibi=False), {"q", "k", "scores"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_entry_is_not_offered(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, family, wrong = MISTAKES[mistake]
    right = load(tiny(arch)).manifest
    found = settled(monkeypatch, arch, family)
    for block in found.blocks:
        there = {*found.named[block], *found.named[""]}
        assert not wrong & there
        assert not there - {*right.named[block], *right.named[""]} - {"resid_mid"}
        assert {"resid_pre", "resid_post", "logits"} <= there
    reasons = {**found.refused[""], **found.refused.get(found.blocks[0], {})}
    assert all("hold" in reasons[name] or "move" in reasons[name] for name in wrong)


def test_a_model_of_no_known_family_keeps_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settled(monkeypatch, "llama", None)
    assert set(found.named[found.blocks[0]]) == {"resid_pre", "resid_post"}
    assert set(found.named[""]) == {"embed", "final_norm", "logits"}
    assert "no family known here" in found.refused[""]["q"]


def test_unknown_types_are_found_by_structure() -> None:
    blocks = {
        arch: load(tiny(arch)) for arch in ("llama", "gemma2", "olmo2", "gpt2", "neox", "bloom", "opt", "phi")
    }
    for arch, loaded in blocks.items():
        first = loaded.manifest.blocks[0]
        found = families.find("nobody_knows", lambda name, at=first, on=loaded: f"{at}.{name}" in on.modules)
        assert found is not None
        assert found.name == arch


@pytest.mark.parametrize("arch", ["gpt2", "falcon", "granite", "mixtral"])
def test_the_plain_form(arch: str) -> None:
    manifest = load(tiny(arch)).manifest
    assert decode_manifest(encode_manifest(manifest)) == manifest
    plain = encode_named(manifest.named)
    assert len(plain["kinds"]) == 2, "blocks that are alike share an entry"
    assert decode_named(plain) == manifest.named


HOSTILE: list[Any] = [
    {"kinds": [], "owners": {"": 0}},
    {"kinds": [{"q": [["m", "output", [1.5]], {"tuple": []}, [], []]}], "owners": {"": 0}},
    {"kinds": [{"q": [["m", "output", []], {"tuple": [3]}, [], []]}], "owners": {"": 0}},
    {"kinds": [{"q": [["m", "output", []], {"tuple": []}, [{"exec": "x"}], []]}], "owners": {"": 0}},
    {"kinds": [{"q": "x"}], "owners": {"": 0}},
]


@pytest.mark.parametrize("plain", HOSTILE)
def test_a_malformed_form_is_refused(plain: Any) -> None:
    manifest = encode_manifest(load(tiny("gpt2")).manifest)
    with pytest.raises(InvalidGraph):
        decode_manifest({**manifest, "named": plain})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loses_no_point(arch: str, dtype: str) -> None:
    full, half = load(tiny(arch)).manifest, load(tiny(arch), dtype=dtype).manifest
    assert {owner: set(points) for owner, points in half.named.items()} == {
        owner: set(points) for owner, points in full.named.items()
    }


def test_trying_leaves_the_model_as_it_was() -> None:
    loaded = load(tiny("llama"))
    again = settle(loaded)
    assert again.manifest == loaded.manifest
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.modules.values())


@pytest.mark.parametrize(
    "module", ["model.layers.0.mlp", "model.layers.0.self_attn", "model.rotary_emb", "lm_head"]
)
def test_memory_the_model_shares_is_written_only_where_that_was_proved(module: str) -> None:
    manifest = load(tiny("llama")).manifest
    assert "stream" in manifest.modules["model.layers.0.post_attention_layernorm"].points
    write = Node(0, "write", ((), ..., 0.0), point=Point(module, "stream", (0, 0)), invoke=0)
    with pytest.raises(UnknownPoint):
        validate(Graph((Run("trace", (Invoke(((5, 6),)),)),), (write,)), manifest, UNLIMITED)
