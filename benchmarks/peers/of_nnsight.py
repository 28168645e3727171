"""Arguments `TINY THREADS` twelve saves; `SMOL THREADS LAYERS CLEAN CORRUPT` a patching sweep.

Prompts are texts; LAYERS as in `0,5,10`.
"""

from __future__ import annotations

from typing import Any

import torch
from answering import Works, bare, model
from nnsight import LanguageModel

PROMPT = "The capital of France is"


def works(folder: str, threads: str, *sweep: str) -> Works:
    plain, tokenizer = model(folder, threads)
    traced = LanguageModel(plain, tokenizer=tokenizer)
    works: dict[str, Any] = {}
    if sweep:
        layers, clean, corrupt = sweep
        texts = [tokenizer(text, return_tensors="pt").input_ids for text in (clean, corrupt)]
        works["sweep"] = lambda: patch(traced, [int(layer) for layer in layers.split(",")], *texts)
    else:
        ids = torch.tensor([tokenizer.encode(PROMPT)])
        works["saves"] = lambda: saves(traced, ids)
        works["bare"] = bare(plain, ids)
    return works


def saves(traced: Any, ids: Any) -> None:
    kept = []
    with traced.trace(ids):
        for block in traced.transformer.h:
            kept.append(block.attn.output[0].save())
            kept.append(block.mlp.output.save())
            kept.append(block.output.save())
    assert len(kept) == 12 and all(isinstance(value, torch.Tensor) for value in kept)


def patch(traced: Any, layers: list[int], clean: Any, corrupt: Any) -> list[Any]:
    """As its users write it: the clean run once, then a trace for each layer and position."""
    known, kept = [], []
    with torch.no_grad():
        with traced.trace(clean):
            for layer in layers:
                known.append(traced.model.layers[layer].output.save())
        for index, layer in enumerate(layers):
            for place in range(corrupt.shape[1]):
                with traced.trace(corrupt):
                    traced.model.layers[layer].output[:, place] = known[index][:, place]
                    logits = traced.output.logits[0, -1].save()
                kept.append(float(logits[0] - logits[1]))
    return kept
