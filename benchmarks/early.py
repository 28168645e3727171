"""Reading layer 2 of 30, beside the whole forward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from interpose import LanguageModel
from lab import CORES, SMOL, bare, smol, smol_server
from table import Row, ms
from timing import Effort, interleaved, ratio, seconds

LAYER = 2
LENGTHS = (12, 128)


class Enough(Exception):
    """Ends a forward."""


def measure(effort: Effort) -> Iterator[Row]:
    plain, server = bare(smol(), CORES), smol_server()
    remote, local = LanguageModel(SMOL, host=server.host, api_key=server.key), LanguageModel(str(smol()))
    for length in LENGTHS:
        ids = [(11 * place) % 40_000 + 100 for place in range(length)]
        tensor = torch.tensor([ids])
        works = [partial(read, remote, ids, remote=True), partial(read, local, ids, remote=False)]
        works += [partial(by_hand, plain, tensor), partial(whole, plain, tensor)]
        *ours, full = interleaved(effort.reads, *(partial(seconds, work) for work in works), warm=3)
        for name, found in zip(("on a server", "in this process", "bare, a hook that raises"), ours, strict=True):
            yield Row(
                f"reading layer {LAYER} of 30, {name}", ms(median(found)),
                f"the bare forward, {ms(median(full))}", f"{ratio(found, full):.2f} of it",
                f"SmolLM2-135M, {length} tokens",
            )  # fmt: skip


def read(model: Any, ids: list[int], *, remote: bool) -> None:
    with model.trace(ids, remote=remote):
        model.model.layers[LAYER].output[0].save()


def whole(plain: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        plain(ids)


def by_hand(plain: Any, ids: torch.Tensor) -> None:
    kept = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(output)
        raise Enough

    handle = plain.model.layers[LAYER].register_forward_hook(keep)
    try:
        with torch.no_grad():
            plain(ids)
    except Enough:
        pass
    finally:
        handle.remove()
