"""The same numbers by transformers and a hook alone, in the worker's image: `reference.py FOLDER`. Prints JSON."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
seen: list[torch.Tensor] = []


def note(module: object, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    seen.append(output if isinstance(output, torch.Tensor) else output[0])


model.model.layers[15].register_forward_hook(note)
with torch.no_grad():
    logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
print(json.dumps({"hidden": seen[0][0, -1].tolist(), "logits": logits[0, -1].tolist()}))
