"""A first look inside: next token, a middle layer, a patch, and a logit lens. Needs no torch on this side.

INTERPOSE_HOST=... INTERPOSE_API_KEY=... python examples/first_trace.py [MODEL]
"""

import sys

import numpy as np
from interpose import LanguageModel
from interpose import torch as t
from rich.console import Console
from rich.table import Table

FRANCE, ITALY = "The capital of France is", "The capital of Italy is"
COUNTRY = -2  # the position of the country's name, in both

model = LanguageModel(sys.argv[1] if len(sys.argv) > 1 else "SmolLM2-135M-Instruct")
layers = model.model.layers
middle = len(layers) // 2


def named(guess) -> list[str]:
    return [repr(model.tokenizer.decode([int(token)])) for token in guess.indices]


def shown(guess) -> str:
    return "  ".join(f"{name} {prob:.3f}" for name, prob in zip(named(guess), guess.values, strict=True))


# Look: the next token, and what a middle layer holds.
with model.trace(FRANCE, remote=True):
    hidden = layers[middle].output[0].save()
    before = t.softmax(model.output[0, -1], dim=-1).topk(5).save()

norms = np.linalg.norm(np.asarray(hidden)[0], axis=-1)
print(f"\nThe model is asked for the next token after {FRANCE!r}.")
print(
    f"Layer {middle} of {len(layers)}: shape {tuple(hidden.shape)}, norm at each position",
    *norms.round().astype(int),
)

# Change: at the country's position, that layer's values are those of another prompt in the same forward.
with model.trace(remote=True) as tracer:
    with tracer.invoke(ITALY):
        italy = layers[middle].output[0][:, COUNTRY]
    with tracer.invoke(FRANCE):
        layers[middle].output[0][:, COUNTRY] = italy
        after = t.softmax(model.output[0, -1], dim=-1).topk(5).save()

print(f"  as it is  {shown(before)}")
print(f"  patched   {shown(after)}")
print(f"Patched: layer {middle} at ' France' holds what it holds at ' Italy' in the other prompt.\n")

# Logit lens: what each layer would say. Only five numbers a layer cross the network.
lens = []
with model.trace(FRANCE, remote=True):
    for layer in layers:
        logits = model.lm_head(model.model.norm(layer.output[0][:, -1]))
        lens.append(t.softmax(logits[0], dim=-1).topk(5).save())

table = Table("layer", "token", "probability", "next four", title="logit lens, last position")
for index, guess in enumerate(lens):
    first, *others = named(guess)
    table.add_row(str(index), first, f"{guess.values[0]:.3f}", " ".join(others))
Console().print(table)
