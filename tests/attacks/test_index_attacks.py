"""Writes of whole numbers that would make the model's kernels look at memory of somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpose.errors import BadArgument, IndexOutOfRange
from recording import opened as model

MOE = ["mixtral", "qwen2_moe", "qwen3_moe"]


def experts(arch: str) -> Any:
    return model(arch).model.layers[1].mlp.experts


PLACING: dict[str, Callable[[Any], Any]] = {
    "sorted": lambda functions: functions.sort[0].output[0],
    "order": lambda functions: functions.sort[0].output[1],
    "rows": lambda functions: functions.floor_divide[0].output,
    "counted": lambda functions: functions.histc[0].input,
    "counts": lambda functions: functions.histc[0].output,
    "added": lambda functions: functions.cumsum[0].input,
    "offsets": lambda functions: functions.cumsum[0].output,
}


@pytest.mark.parametrize("what", PLACING)
@pytest.mark.parametrize("arch", MOE)
def test_where_experts_find_their_tokens_is_read_and_not_written(arch: str, what: str) -> None:
    with model(arch).trace([5, 6, 7]):
        seen = PLACING[what](experts(arch).functions).save()
    assert seen.numel()
    with pytest.raises(BadArgument, match="where things lie"), model(arch).trace([5, 6, 7]):
        PLACING[what](experts(arch).functions)[:] = 0
        model(arch).logits.save()


@pytest.mark.parametrize("arch", MOE)
def test_what_experts_compute_is_written(arch: str) -> None:
    with model(arch).trace([5, 6, 7]):
        plain = model(arch).logits.save()
    with model(arch).trace([5, 6, 7]):
        experts(arch).functions.mul[1].output[:] *= 2
        moved = model(arch).logits.save()
    assert not torch.allclose(plain, moved)


@pytest.mark.parametrize("wrong", [-1, 5, 10**9])
@pytest.mark.parametrize("arch", MOE)
def test_a_token_goes_to_an_expert_there_is(arch: str, wrong: int) -> None:
    with model(arch).trace([5, 6, 7]):
        model(arch).layers[1].expert_ids[:] = 4
        moved = model(arch).logits.save()
    assert bool(moved.isfinite().all())
    with pytest.raises(IndexOutOfRange, match="0 to 4"), model(arch).trace([5, 6, 7]):
        model(arch).layers[1].expert_ids[:, 1] = wrong
        model(arch).logits.save()
    with pytest.raises(IndexOutOfRange, match="0 to 4"), model(arch).trace([5, 6, 7]):
        experts(arch).inputs[0][1][:] = wrong
        model(arch).logits.save()


@pytest.mark.parametrize("arch", ["opt", "gemma3"])
def test_other_kinds_of_embeddings_too(arch: str) -> None:
    table = {
        "opt": lambda: model("opt").model.decoder.embed_positions,
        "gemma3": lambda: model("gemma3").model.embed_tokens,
    }
    with model(arch).trace([5, 6, 7]):
        ids = table[arch]().input
        ids[:, 1] = ids[:, 1] * 0 + 100
        moved = model(arch).logits.save()
    assert bool(moved.isfinite().all())
    with pytest.raises(IndexOutOfRange, match="inputs"), model(arch).trace([5, 6, 7]):
        table[arch]().input[:, 1] = 10**5
        model(arch).logits.save()


@pytest.mark.parametrize("wrong", [-1, 400])
def test_an_embedding_is_given_ids_it_has(wrong: int) -> None:
    gpt2 = model("gpt2")
    with gpt2.trace([5, 6, 7]):
        gpt2.transformer.wte.input[:, 1] = 399
        moved = gpt2.logits.save()
    with gpt2.trace([5, 399, 7]):
        expected = gpt2.logits.save()
    assert torch.equal(moved, expected)
    for table in (gpt2.transformer.wte, gpt2.transformer.wpe):
        with pytest.raises(IndexOutOfRange, match="inputs"), gpt2.trace([5, 6, 7]):
            table.input[:, -1] = wrong
            gpt2.logits.save()
