"""Arguments `TINY THREADS`: run_with_cache of twelve hooks, on its bridge to the same model."""

from __future__ import annotations

from typing import Any

import torch
from answering import Works, bare, model
from transformer_lens import TransformerBridge

PROMPT = "The capital of France is"


def works(folder: str, threads: str) -> Works:
    plain, tokenizer = model(folder, threads)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    # The bridge changes the model it is given.
    under, _ = model(folder, threads)
    lens = TransformerBridge.boot_transformers(folder, hf_model=under, tokenizer=tokenizer, device="cpu")
    return {"saves": lambda: saves(lens, ids), "bare": bare(plain, ids)}


def saves(lens: Any, ids: Any) -> None:
    parts = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")
    names = [f"blocks.{layer}.{part}" for layer in range(4) for part in parts]
    with torch.no_grad():
        _, cache = lens.run_with_cache(ids, names_filter=names)
    assert all(name in cache for name in names)
