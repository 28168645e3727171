"""Half precision: bitwise alone, and how far company moves a value, as `docs/numbers.md` publishes it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.graph.model import Graph
from interpose.runtime.engine import EngineJob
from models import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

ROWS = [[3 + (17 * at + 31 * row) % 390 for at in range(length)] for row, length in enumerate((12, 1, 5, 30))]
PAGE = Path(__file__).parents[2] / "docs" / "numbers.md"
DTYPES = ("float32", "bfloat16", "float16")
FAMILIES = ("gpt2", "llama", "gemma3")


@cache
def model(arch: str, dtype: str) -> Any:
    return LanguageModel(str(tiny(arch, dtype=dtype)))


def published(dtype: str) -> float:
    """The page's figure."""
    (figure,) = re.findall(rf"^\| {dtype} \| ([0-9e.-]+) \|", PAGE.read_text(), re.MULTILINE)
    return float(figure)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("arch", FAMILIES)
@torch.no_grad()
def test_alone_it_is_bitwise_the_plain_forward(arch: str, dtype: str) -> None:
    lm = model(arch, dtype)
    with lm.trace(ROWS[0]):
        for_each = [block.resid_post for block in lm.layers]
        for_each[1][:, -1] *= 1.5
        found = [value.save() for value in for_each]
        logits = lm.logits.save()
    twin = AutoModelForCausalLM.from_pretrained(tiny(arch, dtype=dtype)).eval()
    blocks, seen = [twin.get_submodule(path) for path in lm.manifest.blocks], []

    def hook(module: Any, args: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        if module is blocks[1]:
            value[:, -1] *= 1.5
        seen.append(value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handles = [block.register_forward_hook(hook) for block in blocks]
    expected = twin(torch.tensor([ROWS[0]]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert expected.dtype == getattr(torch, dtype)
    assert not torch.equal(expected, twin(torch.tensor([ROWS[0]]), use_cache=False).logits)
    for one, other in zip([*found, logits], [*seen, expected], strict=True):
        assert torch.equal(one, other)


class Kept(dict[int, Tensor]):
    def save(self, node: int, value: Any) -> None:
        self[node] = value.clone()

    def log(self, node: int, text: str) -> None:
        raise AssertionError

    def cancelled(self) -> bool:
        return False


def intervene(lm: Any) -> list[Any]:
    lm.layers[0].resid_post[:, -1] *= 1.5
    found = [value.save() for block in lm.layers for value in (block.resid_post, block.mlp_out)]
    return [*found, lm.logits.save()]


def apart(found: Tensor, expected: Tensor) -> float:
    """By norm at each position, relative: at most."""
    assert found.shape == expected.shape and torch.isfinite(expected).all()
    one, other = found.double(), expected.double()
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())


def beside_jobs(arch: str, dtype: str) -> float:
    """Most that values move when other jobs share the forward."""
    lm, graphs = model(arch, dtype), list[Graph]()
    for row in ROWS:
        with lm.scan(row) as tracer:
            intervene(lm)
        graphs.append(tracer.recorder.finish()[0])
    sinks = [Kept() for _ in graphs]
    jobs = [EngineJob(graph, {}, sink) for graph, sink in zip(graphs, sinks, strict=True)]
    assert not any(lm._access.local.engine.run(jobs))
    moved = [
        apart(sink[node], expected)
        for row, sink in zip(ROWS, sinks, strict=True)
        for node, expected in zip(sorted(sink), alone(arch, dtype, tuple(row)), strict=True)
    ]
    return max(moved)


def beside_prompts(arch: str, dtype: str) -> float:
    """Most that values move when one run has several prompts, padded on the left."""
    lm, found = model(arch, dtype), list[list[Any]]()
    with lm.trace() as tracer:
        for row in ROWS:
            with tracer.invoke(row):
                found.append(intervene(lm))
    return max(
        apart(value.value, expected)
        for row, values in zip(ROWS, found, strict=True)
        for value, expected in zip(values, alone(arch, dtype, tuple(row)), strict=True)
    )


@cache
def alone(arch: str, dtype: str, row: tuple[int, ...]) -> list[Tensor]:
    lm = model(arch, dtype)
    with lm.trace(list(row)):
        found = intervene(lm)
    return [value.value for value in found]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", FAMILIES)
def test_company_moves_values_by_no_more_than_is_published(arch: str, dtype: str) -> None:
    moved = max(beside_jobs(arch, dtype), beside_prompts(arch, dtype))
    assert 0 < moved <= published(dtype)
