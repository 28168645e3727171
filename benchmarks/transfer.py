"""Large saves, from the `with` to the tensor, beside a raw websocket and a raw socket."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

from interpose import LanguageModel
from lab import PROMPT, TINY, tiny_server
from reference import reference
from table import Row, mb_s
from timing import Effort, interleaved, ratio, seconds
from trips import trips

WIDE = 64
"""The tiny model's width. One column of it, spread to so many bytes of float32, is what is saved."""


def measure(effort: Effort) -> Iterator[Row]:
    server = tiny_server()
    with reference() as ports, trips(*ports) as away:
        model = LanguageModel(TINY, host=server.host, api_key=server.key)
        for size, rounds in ((64 << 20, effort.transfers), (512 << 20, effort.large_transfers)):
            works = (partial(save, model, size), partial(away.websocket, size), partial(away.tcp, size))
            ours, websocket, tcp = interleaved(rounds, *(partial(seconds, work) for work in works), warm=rounds > 1)
            for name, beside in (("raw websocket", websocket), ("raw TCP", tcp)):
                yield Row(
                    f"a save of {size >> 20} MB", mb_s(size, median(ours)), f"{name} {mb_s(size, median(beside))}",
                    f"{1 / ratio(ours, beside):.2f} of its rate", "the whole trace, making the tensor included",
                )  # fmt: skip


def save(model: LanguageModel, size: int) -> None:
    with model.trace(PROMPT, remote=True):
        column = model.transformer.h[2].output[0][0, 0].reshape(WIDE, 1)
        large = column.repeat(1, size // 4 // WIDE).save()
    assert large.nbytes == size
