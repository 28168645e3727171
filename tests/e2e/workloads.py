"""Graphs of different kinds and prompt lengths, written for any model and for clients with or without torch.

Each takes a model and the options of its trace, and returns what it saved by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from interpose import torch as t

Saved = dict[str, Any]
LONG = "Once upon a time there was a small model which learned to read the words inside itself."


def blocks(model: Any) -> Any:
    return model.transformer.h if "transformer" in model.manifest.modules else model.model.layers


def norm(model: Any) -> Any:
    return model.transformer.ln_f if "transformer" in model.manifest.modules else model.model.norm


def look(model: Any, **options: Any) -> Saved:
    with model.trace("Paris", **options):
        saved = {f"block {index}": block.output[0].save() for index, block in enumerate(blocks(model))}
        saved["logits"] = model.output.save()
    return saved


def zero(model: Any, **options: Any) -> Saved:
    with model.trace("The Eiffel Tower is in the city of", **options):
        blocks(model)[1].output[0][:, 2:] = 0
        return {"logits": model.output.save()}


def scale(model: Any, **options: Any) -> Saved:
    with model.trace(LONG, **options):
        blocks(model)[0].output[0][:, -1, :] *= 1.5
        return {"after": blocks(model)[0].output[0].save(), "logits": model.output.save()}


def patch(model: Any, **options: Any) -> Saved:
    with model.trace(**options) as tracer:
        with tracer.invoke("The capital of Italy is"):
            hidden = blocks(model)[1].output[0][:, -1]
        with tracer.invoke("Mary went to the store, and the capital of France is"):
            blocks(model)[1].output[0][:, -1] = hidden
            return {"hidden": hidden.save(), "logits": model.output.save()}


def lens(model: Any, **options: Any) -> Saved:
    saved: Saved = {}
    with model.trace("A quick brown fox jumps over", **options):
        for index, block in enumerate(blocks(model)):
            probs = t.softmax(model.lm_head(norm(model)(block.output[0][:, -1])), dim=-1).topk(5).save()
            saved |= {f"values {index}": probs.values, f"indices {index}": probs.indices}
    return saved


def attention(model: Any, **options: Any) -> Saved:
    first = blocks(model)[0]
    layer = first.attn if "transformer" in model.manifest.modules else first.self_attn
    with model.trace("When Mary and John went to the store", **options):
        return {"pattern": layer.points["pattern"].save(), "logits": model.output.save()}


def steer(model: Any, **options: Any) -> Saved:
    vector = np.random.default_rng(0).standard_normal(64, dtype=np.float32)
    with model.trace("I feel", **options):
        blocks(model)[2].output[0][:] += vector
        return {"steered": blocks(model)[2].output[0].save(), "logits": model.output.save()}


def several(model: Any, **options: Any) -> Saved:
    with model.trace(["Paris", "The capital of France is Paris, and", "Rome is"], **options):
        return {"hidden": blocks(model)[1].output[0].save(), "logits": model.output[:, -1].save()}


def weights(model: Any, **options: Any) -> Saved:
    with model.trace("She said that 12 of the 345 books weren't hers", **options):
        directions = model.lm_head.weight[:7]
        return {"seen": (blocks(model)[1].output[0] @ directions.T).save(), "loss": model.output.mean().save()}


def out_of_range(model: Any, **options: Any) -> Saved:
    """Fails while it runs: which row is asked for depends on values."""
    with model.trace("The capital of Italy is Rome", **options):
        hidden = blocks(model)[0].output[0]
        row = hidden[0].abs().sum().long() + 10_000
        return {"row": hidden[0][row].save()}  # the failing line


def slow(model: Any, steps: int = 60, **options: Any) -> Any:
    """Seconds of work between two hook points, with a save before it and one after; its tracer and both saves."""
    with model.trace([1, 2, 3], **options) as tracer:
        early = blocks(model)[0].output[0].save()
        value = early.mean() + np.eye(1600, dtype=np.float32)
        for _ in range(steps):
            value = (value @ value).clamp(-1, 1)
        blocks(model)[1].output[0][:] += value.mean() * 0
        late = model.output.save()
    return tracer, early, late


PROGRAMS: dict[str, Callable[..., Saved]] = {
    program.__name__: program
    for program in (look, zero, scale, patch, lens, attention, steer, several, weights, out_of_range)
}


def generation(model: Any, **options: Any) -> Saved:
    saved: Saved = {}
    with model.generate("The capital of Italy is", max_new_tokens=5, **options) as tracer:
        for step in tracer.iter[:3]:
            blocks(model)[1].output[0][:, -1] *= 1.2
            saved[f"step {step}"] = model.output[:, -1].save()
        saved["tokens"] = tracer.result.save()
    return saved


def every_step(model: Any, **options: Any) -> Saved:
    with model.generate(["Rome", "The quick brown fox"], max_new_tokens=7, **options) as tracer:
        with tracer.all():
            blocks(model)[0].output[0][:] += 0.05
        return {"tokens": tracer.result.save()}


def gradient(model: Any, **options: Any) -> Saved:
    with model.trace("Tom and James went to the park", **options):
        hidden = blocks(model)[0].output[0]
        late = blocks(model)[1].output[0]
        loss = model.output[0, -1, 7]
        with loss.backward():
            return {"late": late.grad.save(), "early": hidden.grad.save(), "loss": loss.save()}


def control(model: Any, **options: Any) -> Saved:
    with model.trace("She said that he answered", **options) as tracer:
        hidden = blocks(model)[1].output[0]
        chosen = tracer.cond(hidden.sum() > 0, lambda: hidden * 2, lambda: hidden * 3)
        looped = tracer.loop(5, lambda turn, value: value * 0.5 + turn, hidden[0, -1])
        last = tracer.while_loop(
            lambda value: value.norm() > 1, lambda turn, value: value * 0.7, hidden[0, 0], most=9
        )
        return {"chosen": chosen.save(), "looped": looped.save(), "last": last.save()}


def session(model: Any, **options: Any) -> Saved:
    with model.session(**options):
        with model.trace("The capital of France is"):
            hidden = blocks(model)[1].output[0][:, -1]
        with model.trace("Once upon a time the capital of Poland is"):
            blocks(model)[1].output[0][:, -1] = hidden
            return {"logits": model.output.save(), "hidden": hidden.save()}


def late_failure(model: Any, **options: Any) -> Saved:
    """Fails in the middle of a generation."""
    with model.generate("The capital of Italy is Rome", max_new_tokens=6, **options) as tracer, tracer.iter[2]:
        row = blocks(model)[0].output[0].abs().sum().long() + 10_000
        return {"row": model.output[0, -1][row].save()}  # the failing line


MORE: dict[str, Callable[..., Saved]] = {
    program.__name__: program for program in (generation, every_step, gradient, control, session, late_failure)
}
EVERY = PROGRAMS | MORE
