"""A 64 MB save, from the `with` to the tensor, beside a raw websocket and a raw socket."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

from interpose import LanguageModel
from lab import PROMPT, TINY, served, tiny
from reference import SIZE, reference
from table import Row, mb_s
from timing import Effort, interleaved, ratio, seconds
from trips import trips

WIDE = 64
"""The tiny model's width. One column of it, spread to 64 MB of float32, is what is saved."""


def measure(effort: Effort) -> Iterator[Row]:
    with served(TINY, tiny()) as server, reference() as ports, trips(*ports) as away:
        model = LanguageModel(TINY, host=server.host, api_key=server.key)
        works = (partial(save, model), away.websocket, away.tcp)
        ours, websocket, tcp = interleaved(effort.transfers, *(partial(seconds, work) for work in works))
    mine = mb_s(SIZE, median(ours))
    for name, beside in (("raw websocket", websocket), ("raw TCP", tcp)):
        part = f"{1 / ratio(ours, beside):.2f} of its rate"
        yield Row(
            "a save of 64 MB",
            mine,
            f"{name} {mb_s(SIZE, median(beside))}",
            part,
            "the whole trace, making the tensor included",
        )


def save(model: LanguageModel) -> None:
    with model.trace(PROMPT, remote=True):
        column = model.transformer.h[2].output[0][0, 0].reshape(WIDE, 1)
        large = column.repeat(1, SIZE // 4 // WIDE).save()
    assert large.nbytes == SIZE
