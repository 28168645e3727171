"""Models whose rows depend on their neighbours are found out, and their state is put back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from interpose.runtime.feeding import measure_feeding
from interpose.runtime.independence import Buffers, check, thresholds
from interpose.runtime.inputs import batch_inputs, principal, sample_rows
from interpose.runtime.loading import wrap
from models import tiny
from torch import nn
from transformers import AutoModelForCausalLM

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 20,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
}
SCALED = {"dynamic": (DYNAMIC, 20), "longrope": (LONG, 128)}


def scaled(kind: str, **options: Any) -> Any:
    rope, longest = SCALED[kind]
    folder = tiny("llama", rope_parameters=rope, max_position_embeddings=longest)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def verdict(model: Any, longest: int | None = None) -> tuple[bool, str]:
    return check(model, measure_feeding(model, "cpu"), torch.device("cpu"), longest)[:2]


@pytest.mark.parametrize("arch", ["gpt2", "mistral", "gemma3", "mixtral", "bloom", "bert"])
def test_ordinary_models_are_independent(arch: str) -> None:
    loaded = wrap(AutoModelForCausalLM.from_pretrained(tiny(arch)), arch)
    assert loaded.manifest.row_independent, loaded.manifest.row_note
    assert "checked beside rows of 24 tokens" in loaded.manifest.row_note


@pytest.mark.parametrize("kind", SCALED)
def test_positions_rescaled_by_the_longest_row(kind: str) -> None:
    independent, note = verdict(scaled(kind))
    assert not independent
    assert "beside one of" in note


@pytest.mark.parametrize("kind", SCALED)
def test_rows_that_cannot_reach_the_threshold_are_independent(kind: str) -> None:
    assert verdict(scaled(kind), longest=20)[0]


def test_a_threshold_that_is_too_far_or_too_fine_to_check_counts() -> None:
    far = LONG | {"original_max_position_embeddings": 100_000}
    model = AutoModelForCausalLM.from_pretrained(
        tiny("llama", rope_parameters=far, max_position_embeddings=1_000_000)
    )
    independent, note = verdict(model, 1_000_000)
    assert not independent and "100000" in note
    assert verdict(model, 90_000)[0]
    assert not verdict(scaled("longrope", dtype=torch.bfloat16))[0]


def test_memory_of_earlier_lengths_is_found_without_company() -> None:
    class Remembers(nn.Module):
        """Adds the longest length it ever saw."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 4)
            self.register_buffer("longest", torch.zeros(()))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            before = self.longest.clone()
            self.longest.clamp_(min=float(input_ids.shape[1]))
            return self.table(input_ids) + (before > 12)

    independent, note = verdict(Remembers().requires_grad_(False))
    assert not independent and "after one of" in note


def test_activations_quantized_by_the_batchs_largest() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this module will move elsewhere
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    loaded = wrap(model, "quantized")
    assert not loaded.manifest.row_independent
    assert "changes" in loaded.manifest.row_note


@pytest.mark.parametrize("kind", SCALED)
@torch.no_grad()
def test_buffers_put_a_model_back(kind: str) -> None:
    model = scaled(kind)
    feeding = measure_feeding(model, "cpu")
    short, long = ([rows] for rows in sample_rows(model, [10, 60]))

    def run(row: list[list[int]]) -> torch.Tensor:
        return principal(model(**feeding.kwargs(batch_inputs([row]))))

    buffers = Buffers(model)
    expected = run(short)
    for _ in range(2):
        with buffers:
            run(long)
        rotary = model.model.rotary_emb
        assert int(rotary.max_seq_len_cached) == SCALED[kind][1]
        assert torch.equal(rotary.inv_freq, rotary.original_inv_freq)
        with buffers:
            assert torch.equal(run(short), expected)


def test_thresholds_come_from_all_of_a_config() -> None:
    assert thresholds(scaled("dynamic").config) == [20]
    assert thresholds(scaled("longrope").config) == [20, 128]
    assert thresholds(AutoModelForCausalLM.from_pretrained(tiny("mistral")).config) == [12]
    assert thresholds(None) == []
