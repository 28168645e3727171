"""Models that take more than token ids: what they are run on, and how the library runs them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from interpose import LanguageModel
from models import BEYOND, tiny
from torch import Tensor

SIDE, PLACES = 24, 9
"""Of the tiny vision models: pixels a side, and places one image takes in a prompt."""

FEEDS: dict[str, str] = {
    "mamba2": "ids",
    "falcon_mamba": "ids",
    "bert_base": "types",
    "bert_classes": "types",
    "roberta": "ids",
    "clip_text": "ids",
    "vit": "pixels",
    "vit_classes": "pixels",
    "clip_vision": "pixels",
    "clip": "ids and pixels",
    "llava": "places",
    "gemma3_images": "places and types",
    "qwen2_vl": "patches",
}


@cache
def ours(arch: str) -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel(str(tiny(arch)))


@cache
def stock(arch: str, attention: str = "sdpa") -> Any:
    cls = getattr(transformers, BEYOND[arch][0])
    state_space = FEEDS[arch] == "ids" and "mamba" in arch
    options = {} if state_space else {"attn_implementation": attention}
    return cls.from_pretrained(tiny(arch), **options).eval().requires_grad_(False)


def pixels(images: int, seed: int = 0) -> Tensor:
    return torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def given(arch: str, rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of so many rows, each with an image where the model takes any."""
    feeds = FEEDS[arch]
    if feeds == "pixels":
        return {"pixel_values": pixels(rows, seed)}
    image = ours(arch).manifest.image_token
    taken = {"places": PLACES, "places and types": PLACES, "patches": 4}.get(feeds, 0)
    made = [
        [9 + seed, *([image] * taken), *(40 + (7 * row + 11 * at + seed) % 300 for at in range(6))]
        for row in range(rows)
    ]
    ids = torch.tensor(made)
    if arch.startswith("clip"):
        ids[:, -1] = 1  # the text's end, where it is pooled
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if feeds == "types":
        found["token_type_ids"] = (torch.arange(ids.shape[1]) > 3).long().expand_as(ids).contiguous()
    if feeds in ("ids and pixels", "places", "places and types"):
        found["pixel_values"] = pixels(rows, seed)
    if feeds == "places and types":
        found["token_type_ids"] = (ids == image).long()
    if feeds == "patches":
        found["pixel_values"] = torch.randn(16 * rows, 96, generator=torch.Generator().manual_seed(seed))
        found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        found["mm_token_type_ids"] = (ids == image).long()
    return found


def cacheless(arch: str, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """As a trace runs it: without a cache, which changes the path through some models."""
    takes = stock(arch).forward.__code__.co_varnames
    return {**inputs, "use_cache": False} if "mamba" in arch or "use_cache" in takes else inputs
