"""Tiny models, whole and split, and what is fed to both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from cutting import Cut, block_ranges, cut
from interpose.runtime import nests
from models import ARCHITECTURES, BEYOND, tiny


def whole(arch: str, **overrides: Any) -> Any:
    """The library's own model, as the engine has it."""
    cls = getattr(transformers, (ARCHITECTURES | BEYOND)[arch][0])
    return cls.from_pretrained(tiny(arch, **overrides)).eval().requires_grad_(False)


@contextmanager
def split(model: Any, shards: int) -> Iterator[Cut]:
    """The same model with its blocks on so many sites."""
    parts = cut(model, block_ranges(model, shards))
    try:
        yield parts
    finally:
        parts.route.close()


def fed(arch: str, seed: int = 1) -> dict[str, Any]:
    """Two rows, the first padded on the left; an image each for models of images."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    if arch.startswith(("vit", "clip")) and arch != "clip_text":
        found["pixel_values"] = torch.randn(2, 3, 24, 24, generator=generator)
    if not arch.startswith("vit") and arch != "clip_vision":
        found["input_ids"] = torch.randint(5, 300, (2, 17), generator=generator)
        found["attention_mask"] = torch.tensor([[0] * 5 + [1] * 12, [1] * 17])
    return found


def assert_same(one: Any, other: Any) -> None:
    """The same tensors at the same places, bit for bit, and ordinary ones."""
    expected, found = nests.tensors(dict(one)), nests.tensors(dict(other))
    assert [path for path, _ in expected] == [path for path, _ in found]
    for (path, tensor), (_, split_tensor) in zip(expected, found, strict=True):
        assert type(split_tensor) is torch.Tensor
        assert torch.equal(tensor, split_tensor), path
