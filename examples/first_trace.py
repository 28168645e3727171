"""A first look inside: next token, a middle layer, a patch, and a logit lens. Needs no torch on this side.

INTERPOSE_HOST=... INTERPOSE_API_KEY=... python examples/first_trace.py [MODEL]
"""

import sys

import numpy as np
from interpose import LanguageModel
from interpose import torch as t
from rich.console import Console
from rich.table import Table

PROMPT, OTHER = "The capital of France is", "The capital of Italy is"

model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "SmolLM2-135M-Instruct")
layers = model.model.layers
middle = len(layers) // 2
out = Console(highlight=False)


def top(probs, ids) -> str:
    words = [model.tokenizer.decode([int(token)]) for token in ids]
    return "  ".join(f"{word!r} {float(prob):.3f}" for word, prob in zip(words, probs, strict=True))


# Look: the next token, and what a middle layer holds.
with model.trace(PROMPT, remote=True):
    hidden = layers[middle].output[0].save()
    before = t.softmax(model.output[0, -1], dim=-1).topk(5).save()

out.print(f"\n[bold]{PROMPT}[/bold]")
out.print(f"layer {middle} of {len(layers)}: shape {tuple(hidden.shape)}, norms by position "
          f"{np.linalg.norm(np.asarray(hidden)[0], axis=-1).round(1).tolist()}")  # fmt: skip
out.print(f"before: {top(before.values, before.indices)}")

# Change: the last position of that layer, taken from another prompt in the same forward.
with model.trace(remote=True) as tracer:
    with tracer.invoke(OTHER):
        italy = layers[middle].output[0][:, -1]
    with tracer.invoke(PROMPT):
        layers[middle].output[0][:, -1] = italy
        after = t.softmax(model.output[0, -1], dim=-1).topk(5).save()

out.print(f"after : {top(after.values, after.indices)}   (layer {middle} patched from {OTHER!r})\n")

# Logit lens: what each layer would say. Only five numbers a layer cross the network.
lens = []
with model.trace(PROMPT, remote=True):
    for layer in layers:
        logits = model.lm_head(model.model.norm(layer.output[0][:, -1]))
        lens.append(t.softmax(logits[0], dim=-1).topk(5).save())

table = Table("layer", "token", "probability", "next four", title="logit lens, last position")
for index, guess in enumerate(lens):
    words = [model.tokenizer.decode([int(token)]) for token in guess.indices]
    table.add_row(str(index), repr(words[0]), f"{float(guess.values[0]):.3f}", " ".join(map(repr, words[1:])))
out.print(table)
