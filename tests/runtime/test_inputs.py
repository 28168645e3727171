"""Prompts of unequal length in one batch get what each would get alone, whichever side the padding is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpose.errors import BadArgument
from interpose.runtime.feeding import measure_feeding
from interpose.runtime.inputs import batch_inputs, principal, sample_rows
from models import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, RobertaConfig, RobertaForMaskedLM

ROWS = [[5, 6, 7, 8, 9, 10, 11], [15, 16], [25, 26, 27, 28]]


def model(arch: str) -> Any:
    if arch == "roberta":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return RobertaForMaskedLM(RobertaConfig(vocab_size=99, max_position_embeddings=34, **sizes)).eval()
    kind = AutoModelForMaskedLM if arch == "bert" else AutoModelForCausalLM
    return kind.from_pretrained(tiny(arch)).eval()


def run(found: Any, runs: list[list[list[int]]]) -> Tensor:
    return principal(found(**measure_feeding(found, "cpu").kwargs(batch_inputs(runs))))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "opt", "bloom", "bert", "roberta"])
@pytest.mark.parametrize("runs", [[ROWS], [[row] for row in ROWS], [ROWS[1:], ROWS[:1]], [[ROWS[1]], ROWS[::2]]])
@torch.no_grad()
def test_company_changes_nothing(arch: str, runs: list[list[list[int]]]) -> None:
    found = model(arch)
    together = run(found, runs)
    assert together.isfinite().all()  # padded places too: a NaN there would spread through a backward
    mask = batch_inputs(runs).attention_mask.bool()
    for at, row in enumerate(row for rows in runs for row in rows):
        alone = run(found, [[row]])[0]
        assert (together[at][mask[at]] - alone).abs().max() <= 1e-5 * alone.abs().max()


@torch.no_grad()
def test_a_batch_without_padding_is_the_plain_call() -> None:
    found = model("llama")
    inputs = batch_inputs([ROWS[:1]])
    assert set(measure_feeding(found, "cpu").kwargs(inputs)) == {"input_ids", "attention_mask"}
    assert torch.equal(run(found, [ROWS[:1]]), found(torch.tensor(ROWS[:1])).logits)


def test_runs_are_left_padded_inside_and_right_padded_between() -> None:
    inputs = batch_inputs([[[1, 2], [3]], [[4, 5, 6]]])
    assert inputs.input_ids.tolist() == [[1, 2, 0], [0, 3, 0], [4, 5, 6]]
    assert inputs.attention_mask.tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 1]]
    assert inputs.position_ids.tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 2]]
    assert (inputs.widths, inputs.rows, inputs.padded) == ((2, 3), (2, 1), True)


@pytest.mark.parametrize("runs", [[], [[]], [[[1], []]]])
def test_a_prompt_without_tokens_is_refused(runs: list[list[list[int]]]) -> None:
    with pytest.raises(BadArgument, match="at least one token"):
        batch_inputs(runs)


def test_positions_that_start_elsewhere_are_found() -> None:
    assert measure_feeding(model("roberta"), "cpu").offset == 2
    assert measure_feeding(model("gpt2"), "cpu").offset == 0
    assert measure_feeding(model("bloom"), "cpu").offset is None


def test_sample_rows_hold_no_special_tokens() -> None:
    found = model("bert")
    assert found.config.pad_token_id == 0
    assert 0 not in {token for row in sample_rows(found, [50, 60]) for token in row}
