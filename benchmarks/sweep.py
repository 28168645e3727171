"""Activation patching at every layer and position, as a session, beside the loop in nnsight and loops by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from interpose import LanguageModel
from lab import CORES, SMOL, bare, smol, smol_server
from peer import peer
from table import Row
from timing import Effort, interleaved, ratio, seconds

CLEAN = "When Mary and John went to the store, John gave a"
CORRUPT = "When Mary and John went to the store, Mary gave a"
LAYERS, PLACES = 30, 12


def measure(effort: Effort) -> Iterator[Row]:
    plain, server = bare(smol(), CORES), smol_server()
    remote, local = LanguageModel(SMOL, host=server.host, api_key=server.key), LanguageModel(str(smol()))
    ids = [torch.tensor([local.tokenizer.encode(text)]) for text in (CLEAN, CORRUPT)]
    assert all(one.shape == (1, PLACES) for one in ids)
    # The loops take as long at each layer: some of them stand for all.
    some = list(range(0, LAYERS, LAYERS // effort.loop_layers))[: effort.loop_layers]
    whole = LAYERS / len(some)
    with peer("nnsight", smol(), CORES, ",".join(map(str, some)), CLEAN, CORRUPT) as other:
        measures = [partial(seconds, partial(session, model, remote=model is remote)) for model in (remote, local)]
        measures.append(partial(seconds, partial(batched, plain, *ids)))
        measures.append(lambda: whole * seconds(partial(loop, plain, some, *ids)))
        if other is not None:
            measures.append(lambda: whole * other.seconds("sweep", once=True))
        away, here, best, *loops = interleaved(effort.sweeps, *measures, warm=0)
        labels = ["a loop of bare forwards", *([f"the loop in {other.label}"] if other is not None else [])]
    for label, found in zip(labels, loops, strict=True):
        for name, ours in (("on a server", away), ("in this process", here)):
            yield Row(
                f"patching {LAYERS} layers by {PLACES} positions, {name}", f"{median(ours):.1f} s",
                f"{label}, {median(found):.1f} s", f"{1 / ratio(ours, found):.1f} times faster",
                f"SmolLM2-135M, a session; by hand in {LAYERS} batches of {PLACES}: {median(best):.1f} s",
            )  # fmt: skip


def session(model: Any, *, remote: bool) -> None:
    layers, kept = model.model.layers, []
    with model.session(remote=remote):
        with model.trace(CLEAN):
            clean = [layer.output[0] for layer in layers]
        for index, layer in enumerate(layers):
            for place in range(PLACES):
                with model.trace(CORRUPT):
                    layer.output[0][:, place] = clean[index][:, place]
                    logits = model.output[0, -1]
                    kept.append((logits[0] - logits[1]).save())
    assert len(kept) == LAYERS * PLACES


def loop(plain: Any, layers: list[int], clean: torch.Tensor, corrupt: torch.Tensor) -> list[float]:
    """A forward for each layer and position, one row each."""
    found = []
    with torch.no_grad():
        known = outputs(plain, clean)
        for index in layers:
            for place in range(PLACES):
                logits = patched(plain, index, known[index][:, place], [place], corrupt)
                found.append(float(logits[0, 0] - logits[0, 1]))
    return found


def outputs(plain: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block puts out."""
    found: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda *args: found.append(args[2])) for layer in plain.model.layers]
    try:
        plain(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def batched(plain: Any, clean: torch.Tensor, corrupt: torch.Tensor) -> torch.Tensor:
    """All positions of a layer as the rows of one forward: what a careful person writes."""
    found = []
    with torch.no_grad():
        known = outputs(plain, clean)
        rows = corrupt.expand(PLACES, -1)
        for index in range(LAYERS):
            logits = patched(plain, index, known[index][0], list(range(PLACES)), rows, logits_to_keep=1)
            found.append(logits[:, 0] - logits[:, 1])
    return torch.stack(found)


def patched(
    plain: Any, index: int, values: torch.Tensor, places: list[int], ids: torch.Tensor, **options: int
) -> torch.Tensor:
    """The last logits, [rows, vocabulary], with a value at one place of each row."""

    def patch(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[torch.arange(len(places)), places] = values
        return changed

    handle = plain.model.layers[index].register_forward_hook(patch)
    try:
        logits: torch.Tensor = plain(ids, use_cache=False, **options).logits[:, -1]
    finally:
        handle.remove()
    return logits
