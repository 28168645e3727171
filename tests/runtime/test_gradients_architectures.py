"""Gradients of every block, sublayer and attention pattern of each architecture, against autograd by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from interpose.graph.manifest import Leaf
from models import tiny
from recording import opened
from torch import Tensor
from transformers import AutoModelForCausalLM

ARCHITECTURES = [
    *("gpt2", "llama", "gemma2", "gemma3", "neox", "opt", "phi", "mixtral", "bloom", "falcon", "granite", "olmo2"),
    *("qwen3_moe", "mamba", "mpt"),
]
ROWS = [[5, 9, 33, 7, 81, 120], [8, 81, 2]]
TARGET = 77


@cache
def stock(arch: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny(arch)).eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert torch.isfinite(expected).all()
    assert expected.abs().max() > 0
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def by_hand(arch: str, row: list[int], paths: list[str]) -> list[Tensor]:
    model, seen, handles = stock(arch), {}, []
    for path in paths:

        def hook(module: Any, args: Any, output: Any, path: str = path) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            seen[path] = first
            # A copy goes on, as some models write over what a module returned.
            return (first.clone(), *output[1:]) if isinstance(output, tuple) else first.clone()

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        logits = model(input_ids=torch.tensor([row])).logits
    finally:
        for handle in handles:
            handle.remove()
    return list(torch.autograd.grad(logits[0, -1, TARGET], [seen[path] for path in paths]))


def places(arch: str) -> list[str]:
    """Blocks, and their direct children that give one floating-point tensor."""
    manifest = opened(arch).manifest
    children = [f"{block}.{name}" for block in manifest.blocks for name in manifest.children[block]]
    infos = [manifest.modules[path] for path in children]
    once = [info for info in infos if len(info.events.get("exit", ())) == 1]
    found = [info.path for info in once if isinstance(info.points.get("output"), Leaf)]
    return [*manifest.blocks, *found]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_block_and_sublayer(arch: str) -> None:
    model, paths = opened(arch), places(arch)
    assert len(paths) > 5
    saved: list[list[Any]] = []
    with model.trace() as tracer:
        losses = []
        for row in ROWS:
            with tracer.invoke(row):
                values = []
                for path in paths:
                    module = model
                    for part in path.split("."):
                        module = module[int(part)] if part.isdigit() else getattr(module, part)
                    values.append(module.output)
                losses.append(model.output[0, -1, TARGET])
                saved.append(values)
        with torch.stack(losses).sum().backward():
            found = [[value.grad.save() for value in values] for values in saved]
    for row, gradients in zip(ROWS, found, strict=True):
        for gradient, expected in zip(gradients, by_hand(arch, row, paths), strict=True):
            close(gradient, expected)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "neox", "qwen3_moe"])
def test_attention_patterns_and_heads(arch: str) -> None:
    model = opened(arch)
    eager = AutoModelForCausalLM.from_pretrained(tiny(arch), attn_implementation="eager").eval()
    with model.trace() as tracer:
        losses, saved = [], []
        for row in ROWS:
            with tracer.invoke(row):
                saved.append([block.pattern for block in model.layers])
                losses.append(model.output[0, -1, TARGET])
        with torch.stack(losses).sum().backward():
            found = [[pattern.grad.save() for pattern in patterns] for patterns in saved]
    for row, gradients in zip(ROWS, found, strict=True):
        output = eager(input_ids=torch.tensor([row]), output_attentions=True)
        expected = torch.autograd.grad(output.logits[0, -1, TARGET], output.attentions)
        for gradient, wanted in zip(gradients, expected, strict=True):
            close(gradient, wanted)
