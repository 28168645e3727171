"""Untouched, a generation is the library's `generate` on every architecture, whatever it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from at_points import ours, stock
from models import ARCHITECTURES, tiny
from torch import Tensor

DECODERS = [arch for arch in ARCHITECTURES if arch != "bert"]
ROW = [5 + 17 * place % 300 for place in range(9)]
PROMPTS = [ROW, ROW[2:5], [44], [*ROW[::-1], 7, 12, 90, 31]]
NEW = 8


def library(arch: str, row: list[int], **options: Any) -> Tensor:
    ids = torch.tensor([row])
    seed = options.pop("seed", None)
    if seed is not None:
        torch.manual_seed(seed)
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    found: Tensor = stock(tiny(arch), arch, False).generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found


def generated(arch: str, prompt: Any, **options: Any) -> Tensor:
    with ours(arch).generate(prompt, **{"max_new_tokens": NEW, **options}) as tracer:
        tokens = tracer.result.save()
    found: Tensor = tokens.value
    return found


@pytest.mark.parametrize("arch", DECODERS)
def test_asked_for_in_every_way(arch: str) -> None:
    greedy = library(arch, ROW, eos_token_id=-1)[0, len(ROW) :].tolist()
    assert generated(arch, ROW, eos_token_id=-1)[0, len(ROW) :].tolist() == greedy
    sampling = {"do_sample": True, "seed": 3}
    seen = {tuple(greedy)}
    for options in (
        {},
        {"eos_token_id": [399, greedy[3], greedy[5]]},
        {"eos_token_id": greedy[0], "min_new_tokens": 4},
        {"repetition_penalty": 1.8, "eos_token_id": -1},
        {**sampling, "temperature": 4.0, "eos_token_id": -1},
        {**sampling, "temperature": 20.0, "top_p": 0.8, "eos_token_id": -1},
        {**sampling, "top_k": 7, "repetition_penalty": 1.3, "eos_token_id": -1},
        {**sampling, "seed": 4, "top_k": 0, "min_p": 0.01, "eos_token_id": -1},
    ):
        expected = library(arch, ROW, **options)
        assert torch.equal(generated(arch, ROW, **options), expected), options
        seen.add(tuple(expected[0, len(ROW) :].tolist()))
    assert len(seen) >= 4, "the options change nothing"


@pytest.mark.parametrize("arch", DECODERS)
def test_prompts_of_different_lengths_each_as_alone(arch: str) -> None:
    tokens = generated(arch, PROMPTS, eos_token_id=-1)
    assert tokens.shape == (len(PROMPTS), max(map(len, PROMPTS)) + NEW)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        expected = library(arch, prompt, eos_token_id=-1)[0]
        assert row[-len(prompt) - NEW :].tolist() == expected.tolist()
