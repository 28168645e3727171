"""A random model of a Llama's shape, its prompts, and how to time what runs on its device."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from interpose import LanguageModel
from interpose.runtime.engine import Engine
from timing import interleaved, seconds


class Bench:
    """The model, its prompts, and how to time what runs on the device."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        self.wanted = wanted
        self.plain = made(wanted)
        self.model = LanguageModel(self.plain)
        self.layers = range(wanted.layers)
        self.size = wanted.layers * wanted.tokens * wanted.width * self.plain.dtype.itemsize
        """Bytes of all layers' hidden states of one prompt."""

    @property
    def engine(self) -> Engine:
        return self.model._access.local.engine

    def ids(self, rows: int, tokens: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(rows)
        return torch.randint(0, self.wanted.vocab, (rows, tokens), generator=draw)

    def prompt(self, row: int, tokens: int) -> list[int]:
        return [int(token) for token in self.ids(row + 1, tokens)[row]]

    def forward(self, ids: torch.Tensor, **options: Any) -> None:
        with torch.no_grad():
            self.plain(ids.to(self.plain.device), use_cache=False, **options)

    def timed(self, work: Callable[[], object]) -> Callable[[], float]:
        """Seconds until the device has done everything too."""
        sync = torch.cuda.synchronize if self.plain.device.type == "cuda" else lambda: None

        def both() -> None:
            work()
            sync()

        return partial(seconds, both)

    def times(self, *works: Callable[[], object]) -> list[list[float]]:
        return interleaved(self.wanted.repeat, *map(self.timed, works), warm=3)


def made(wanted: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=wanted.width, num_hidden_layers=wanted.layers, num_attention_heads=wanted.heads,
        num_key_value_heads=wanted.kv_heads, intermediate_size=wanted.mlp, vocab_size=wanted.vocab,
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, wanted.dtype))
    try:
        with torch.device(wanted.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
