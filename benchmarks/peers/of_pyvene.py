"""Arguments `TINY THREADS`: twelve interventions that collect."""

from __future__ import annotations

from typing import Any

import pyvene
import torch
from answering import Works, bare, model

PROMPT = "The capital of France is"


def works(folder: str, threads: str) -> Works:
    plain, tokenizer = model(folder, threads)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    under, _ = model(folder, threads)
    points = [f"transformer.h[{layer}].{part}output" for layer in range(4) for part in ("attn.", "mlp.", "")]
    asked = [{"component": point, "intervention": pyvene.CollectIntervention()} for point in points]
    collecting = pyvene.IntervenableModel(asked, model=under)
    return {"saves": lambda: saves(collecting, ids), "bare": bare(plain, ids)}


def saves(collecting: Any, ids: Any) -> None:
    with torch.no_grad():
        (_, collected), _ = collecting({"input_ids": ids})
    assert len(collected) == 12
