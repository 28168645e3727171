"""Generation with a split model: home's cache has the lengths, the shards' have the data."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from cutting import Cut
from interpose.errors import InternalError
from interpose.runtime import caches
from splitting import assert_same, fed, split, whole
from transformers import DynamicCache, StaticCache

ARCHS = [
    *("gpt2", "llama", "mistral", "gemma2", "gemma3", "neox", "opt", "bloom", "falcon", "mpt", "mixtral", "mamba"),
    *("mamba2", "falcon_mamba", "qwen3_moe", "llava", "gemma3_images", "qwen2_vl"),
]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3},
    "beams": {"num_beams": 3, "do_sample": False},
}


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    found: torch.Tensor = model.generate(**inputs, max_new_tokens=7, min_new_tokens=7, **options)
    return found


def kept(parts: Cut) -> list[int]:
    """How many caches each shard has."""
    gc.collect()
    found = []
    for site, stop in parts.route._stops.items():
        parts.route._threads[site].run(lambda: None)
        found.append(len(stop.station._caches._caches))  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_as_the_library_generates(arch: str) -> None:
    model, inputs = whole(arch), fed(arch)
    with split(model, 2 if arch == "mpt" else 3) as parts:
        for kind, options in KINDS.items():
            if kind == "beams" and "mamba" in arch:
                continue  # the library has no beams for these
            expected = generated(model, inputs, **options)
            assert torch.equal(generated(parts.home, inputs, **options), expected), kind
        assert not any(kept(parts))


@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
@torch.no_grad()
def test_step_by_step_with_every_logit(arch: str) -> None:
    """Left-padded rows through three windows' worth of steps."""
    model, inputs = whole(arch), fed(arch)
    with split(model, 2) as parts:
        steps = [_steps(kind, inputs, 30) for kind in (model, parts.home)]
        for one, other in zip(*steps, strict=True):
            assert torch.equal(one, other)


def _steps(model: Any, inputs: dict[str, Any], count: int) -> list[torch.Tensor]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, found = DynamicCache(config=model.config), []
    for _ in range(count):
        fresh = ids[:, cache.get_seq_length() :]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        output = model(fresh, attention_mask=mask, position_ids=positions, past_key_values=cache)
        found.append(output.logits)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert cache.get_seq_length() == ids.shape[1] - 1
    return found


@torch.no_grad()
def test_a_static_cache() -> None:
    model, inputs = whole("llama"), fed("llama")
    with split(model, 2) as parts:
        found = []
        for one in (model, parts.home):
            cache = StaticCache(config=model.config, max_cache_len=40)
            first = one(**inputs, past_key_values=cache).logits
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
            found.append([first, one(first[:, -1:].argmax(-1), attention_mask=mask, past_key_values=cache).logits])
        assert all(map(torch.equal, *found))


def _played(model: Any) -> list[torch.Tensor]:
    """Rows leave, others join, the cache is cropped and its rows are repeated; then it is used again."""
    one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    found = []

    def step(cache: Any, ids: torch.Tensor, length: int) -> None:
        mask = torch.ones(ids.shape[0], length)
        positions = torch.arange(length)[None, -ids.shape[1] :].expand_as(ids)
        found.append(model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)

    ids = torch.arange(5, 41).view(3, 12)
    step(one, ids, 12)
    step(other, ids[:2, :9], 9)
    step(other, ids[:2, 9:10], 10)
    caches.keep(other, [1], 1)
    caches.keep(one, [2, 0], 2)
    caches.join(one, other)
    del other
    gc.collect()
    assert one.get_seq_length() == 10
    step(one, ids[:, :1], 11)
    one.crop(-2)
    assert one.get_seq_length() == 9
    step(one, ids[:, 1:3], 11)
    one.batch_repeat_interleave(2)
    one.reorder_cache(torch.tensor([5, 4, 0, 1, 2, 2]))
    step(one, ids[[0, 1, 2, 0, 1, 2], :1], 12)
    one.batch_select_indices(torch.tensor([3, 1]))
    step(one, ids[:2, :2], 14)
    one.reset()
    step(one, ids[:2], 12)
    return found


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@torch.no_grad()
def test_what_is_done_to_a_cache_at_home_is_done_on_every_shard(arch: str) -> None:
    model = whole(arch)
    with split(model, 3) as parts:
        for _ in range(2):
            for one, other in zip(_played(model), _played(parts.home), strict=True):
                assert torch.equal(one, other)
        assert not any(kept(parts))


@torch.no_grad()
def test_caches_that_can_not_be_followed_say_so() -> None:
    model, inputs = whole("llama"), fed("llama")
    filled = model(**inputs).past_key_values
    with split(model, 2) as parts:
        with pytest.raises(InternalError, match="filled elsewhere"):
            parts.home(inputs["input_ids"][:, :1], past_key_values=filled)
        own = parts.home(**inputs).past_key_values
        assert caches.flexible(own)
        own.layers[0].keys = own.layers[0].keys[:, :, 1:]
        with pytest.raises(InternalError, match="can't follow"):
            parts.home(inputs["input_ids"][:, :1], past_key_values=own)
        expected = model(**inputs)
        assert_same({"logits": expected.logits}, {"logits": parts.home(**inputs).logits})
