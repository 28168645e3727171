"""Manifests measured on real architectures: layouts, order, blocks, and what isn't there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from interpose.graph.manifest import Leaf, Manifest, ModuleInfo, decode_manifest, encode_manifest, leaves
from interpose.runtime.hooks import hooked
from interpose.runtime.layouts import Shape, Size, derive
from interpose.runtime.loading import load, wrap
from models import ARCHITECTURES, tiny
from torch import nn
from transformers import AutoModelForCausalLM


def manifest(arch: str) -> Manifest:
    return load(tiny(arch)).manifest


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch: str) -> None:
    found = manifest(arch)
    assert len(found.blocks) == 3
    for block in found.blocks:
        assert leaves(found.modules[block].points["output"])[0] == Leaf(("batch", "seq", 64), "float32")
    root = found.modules[""].points["output"]
    assert isinstance(root, dict) and root["logits"] == Leaf(("batch", "seq", found.vocab or 0), "float32")
    assert decode_manifest(encode_manifest(found)) == found
    assert [path for path in found.modules if path.rpartition(".")[0] not in found.modules] == []


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - {"bloom", "falcon", "mpt", "mamba"}))
def test_points_inside_attention(arch: str) -> None:
    found = manifest(arch)
    assert found.attention == "interpose"
    inside = [info for info in found.modules.values() if "pattern" in info.points]
    assert len(inside) == 3
    width = 24 if arch in ("qwen3", "qwen3_moe", "gemma2", "gemma3") else 16
    for info in inside:
        assert info.points["pattern"] == info.points["scores"] == Leaf(("batch", 4, "seq", "key"), "float32")
        assert info.points["q_rot"] == Leaf(("batch", 4, "seq", width), "float32")
        assert info.points["z"] == Leaf(("batch", "seq", 4, width), "float32")
        assert info.points["k_rot"] == info.points["v"]
        moments = [info.events[name] for name in ("enter", "q_rot", "scores", "pattern", "z", "exit")]
        assert moments == sorted(moments)


def test_figures_that_equal_the_runs_fool_nothing() -> None:
    # Five heads of two, width ten: every constant is some run's rows, positions or product of both.
    sizes = {"n_embd": 10, "n_head": 5, "n_inner": 15, "n_layer": 2, "vocab_size": 21, "n_positions": 14}
    torch.manual_seed(0)
    found = wrap(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), "g").manifest
    block = found.modules["transformer.h.1"]
    assert block.points["output"] == Leaf(("batch", "seq", 10), "float32")
    attention = found.modules["transformer.h.1.attn"]
    assert attention.points["pattern"] == Leaf(("batch", 5, "seq", "key"), "float32")
    assert attention.points["z"] == Leaf(("batch", "seq", 5, 2), "float32")
    assert found.modules["transformer.h.1.mlp.c_fc"].points["output"] == Leaf(("batch", "seq", 15), "float32")


def test_what_varies_otherwise_is_unknown() -> None:
    sizes = [Size(2, 5, 5), Size(3, 5, 5), Size(2, 7, 7), Size(3, 1, 3)]

    def of(*dims: Any) -> Any:
        return derive([(size, Shape(tuple(dim(size) for dim in dims), "float32")) for size in sizes])

    assert of(lambda s: s.batch * s.seq, lambda s: 8) == Leaf(("batch*seq", 8), "float32")
    assert of(lambda s: s.batch * 4, lambda s: s.seq + 1, lambda s: s.key) == Leaf(("?", "?", "key"), "float32")
    assert derive([(sizes[0], None), (sizes[1], Shape((3, 5), "bool"))]) == Leaf(("?",), "bool")
    assert derive([(sizes[0], Shape((2,), "bool")), (sizes[1], Shape((3,), "float32"))]) == Leaf(("?",), "bool")
    assert derive([(sizes[0], None)]) is None


def test_points_that_depend_on_the_style_of_call_are_not_by_rows() -> None:
    info = manifest("llama").modules["model.layers.1.self_attn"]
    inputs = info.points["inputs"]
    assert isinstance(inputs, tuple) and isinstance(inputs[1], dict)
    assert inputs[1]["hidden_states"] == Leaf(("batch", "seq", 64), "float32")
    assert inputs[1]["past_key_values"] is None
    for name in ("attention_mask", "position_embeddings", "position_ids"):
        assert leaves(inputs[1][name]) and not any(leaf.by_rows for leaf in leaves(inputs[1][name])), name


def test_experts_see_tokens_not_rows() -> None:
    found = manifest("mixtral")
    gate = found.modules["model.layers.1.mlp.gate"]
    assert {leaf.dims[0] for leaf in leaves(gate.points["output"])} == {"batch*seq"}
    assert all(leaf.by_rows for leaf in leaves(gate.points["output"]))


@torch.no_grad()
def test_order_is_that_of_an_ordinary_forward() -> None:
    loaded = load(tiny("llama"))
    order: list[tuple[str, str]] = []

    class Log:
        attention = False

        def visit(self, module: str, event: str, call: int, value: Any) -> Any:
            order.append((module, event))
            return value

    with hooked(loaded.modules, loaded.names, Log()):
        loaded.model(torch.tensor([[5, 6, 7]]))
    moments = [loaded.manifest.modules[path].events[event][0] for path, event in order]
    assert moments == sorted(moments)
    assert len(set(moments)) == len(order)


def test_uncalled_dropouts_stand_for_the_pattern() -> None:
    modules = manifest("gpt2").modules
    assert modules["transformer.h.1.attn.attn_dropout"].stands_for == ("transformer.h.1.attn", "pattern")
    assert modules["transformer.h.1.attn.resid_dropout"].stands_for is None
    assert modules["transformer.h"].events == {}


def test_a_module_called_twice_has_two_moments() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 6)
            self.mix = nn.Linear(6, 6)
            self.never = nn.Linear(6, 6)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.mix(self.mix(self.table(input_ids)))

    found = wrap(Twice(), "twice").manifest
    assert found.modules["mix"].events == {"enter": (3, 5), "exit": (4, 6)}
    assert found.modules["mix"].points["output"] == Leaf(("batch", "seq", 6), "float32")
    assert found.modules["never"].events == {} and "weight" in found.modules["never"].params
    assert "transformers" in found.attention


def test_a_model_that_takes_no_tokens_is_described_all_the_same() -> None:
    found = wrap(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "plain").manifest
    assert list(found.modules) == ["", "0", "1"]
    assert found.modules["0"].params["weight"].shape == (4, 3)
    assert not found.row_independent and "takes no input_ids" in found.row_note


def test_a_model_whose_forward_fails_is_described_all_the_same() -> None:
    class Picky(nn.Module):
        def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor | None = None) -> torch.Tensor:
            if pixels is None:
                raise RuntimeError("where are the pixels?")
            return pixels

    found = wrap(Picky(), "picky").manifest
    assert found.modules[""].events == {}
    assert "where are the pixels?" in found.row_note


def test_a_model_without_attention_says_so() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    found = wrap(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)), "mamba").manifest
    assert found.attention == "its forward comes by no attention"
    assert len(found.blocks) == 2


def test_a_sliding_window_does_not_hide_key_lengths() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("mistral", sliding_window=4))
    info = wrap(model, "narrow").manifest.modules["model.layers.0.self_attn"]
    assert info.points["pattern"] == Leaf(("batch", 4, "seq", "key"), "float32")


def test_tied_weights_are_named_at_both_ends() -> None:
    modules = manifest("gpt2").modules
    assert modules["lm_head"].params == modules["transformer.wte"].params


def test_values_that_a_neighbour_shifts_make_their_jobs_run_alone() -> None:
    """MPT counts its attention's biases from the batch's end; its results don't show it, its scores do."""
    assert not any(leaf.alone for path in manifest("gpt2").modules.values() for leaf in _every(path))
    info = manifest("mpt").modules["transformer.blocks.1.attn"]
    scores = leaves(info.points["softmax_0.inputs"])
    assert scores and all(leaf.by_rows and leaf.alone and not leaf.shared for leaf in scores)
    assert all(leaf.shared for leaf in leaves(info.points["softmax_0.output"]))
    assert decode_manifest(encode_manifest(manifest("mpt"))) == manifest("mpt")


def _every(info: ModuleInfo) -> list[Leaf]:
    return [leaf for layout in info.points.values() for leaf in leaves(layout)]
