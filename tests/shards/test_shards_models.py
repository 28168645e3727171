"""Split models over real sockets: the whole model's numbers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from cutting import block_ranges, home_of, parts_of
from interpose.runtime import nests
from interpose.runtime.split.shard import Shard
from interpose_server.shards.link import Link
from interpose_server.shards.standing import Standing
from models import ARCHITECTURES, tiny
from torch import Tensor, nn

ARCHS = ["gpt2", "gemma3", "mixtral", "mamba", "bloom", "falcon", "bert"]


def whole(arch: str) -> Any:
    cls = getattr(transformers, ARCHITECTURES[arch][0])
    return cls.from_pretrained(tiny(arch)).eval().requires_grad_(False)


@contextmanager
def linked(model: nn.Module, count: int) -> Iterator[nn.Module]:
    """The home of a split model whose shards stand behind sockets."""
    paths = block_ranges(model, count)
    secret = secrets.token_bytes(32)
    standing = [
        Standing(site, secret, Shard(site, {path: part.get_submodule(path) for path in own}, torch.device("cpu")))
        for site, (own, part) in enumerate(zip(paths, parts_of(model, paths), strict=True), 1)
    ]
    sites = {path: site for site, own in enumerate(paths, 1) for path in own}
    try:
        link = Link(secret, {shard.site: shard.address for shard in standing}, sites)
        try:
            yield home_of(model, link)[0]
        finally:
            link.close()
    finally:
        for shard in standing:
            shard.close()


def fed(seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (2, 17), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * 5 + [1] * 12, [1] * 17])}


@pytest.mark.parametrize("arch", ARCHS)
def test_forward_generation_gradients(arch: str) -> None:
    model = whole(arch)
    with linked(model, 3) as home:
        with torch.no_grad():
            expected = model(**fed(), output_hidden_states=True)
            found = home(**fed(), output_hidden_states=True)
            for (path, one), (_, other) in zip(nests.tensors(expected), nests.tensors(found), strict=True):
                assert torch.equal(one, other), path
        assert torch.equal(gradient(model), gradient(home))
        if model.can_generate():
            assert torch.equal(generated(model), generated(home))


def gradient(model: Any) -> Tensor:
    embeds = model.get_input_embeddings()(fed()["input_ids"]).requires_grad_()
    output = model(inputs_embeds=embeds, attention_mask=fed()["attention_mask"])
    (found,) = torch.autograd.grad(output.logits.square().mean(), embeds)
    return found


def generated(model: Any) -> Tensor:
    found: Tensor = model.generate(**fed(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return found


@torch.no_grad()
def test_several_forwards_in_flight() -> None:
    model = whole("llama")
    inputs = [fed(seed) for seed in range(6)]

    def run(kwargs: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = home(**kwargs).logits
            return logits

    with linked(model, 2) as home, ThreadPoolExecutor(3) as threads:
        run(inputs[0])
        for kwargs, found in zip(inputs, threads.map(run, inputs), strict=True):
            assert torch.equal(model(**kwargs).logits, found)
