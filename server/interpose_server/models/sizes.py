"""What a model takes of memory, block by block. Plain figures, without torch: `sizing` makes them of a config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Part:
    """A block, or all that lies outside the blocks.

    Attributes:
        weights: bytes of parameters and buffers; what is tied counts once, outside the blocks if it is there too.
        work_token: bytes for each token of a forward at this part's worst moment, beside the residual stream.
        cache_token: bytes that each position of a row takes in a generation's cache.
        cache_row: bytes that each row takes there however long it is, such as a state.
        window: so many positions its cache holds at most; None without bound.
        output_token: bytes of what it hands on for each token; the bytes of one save.
    """

    weights: int
    work_token: int = 0
    cache_token: int = 0
    cache_row: int = 0
    window: int | None = None
    output_token: int = 0

    def cache(self, rows: int, context: int) -> int:
        """Bytes of the cache of so many rows of so many positions."""
        return rows * (self.cache_row + self.cache_token * min(context, self.window or context))


@dataclass(frozen=True)
class Sizes:
    """One model's figures.

    Attributes:
        model: what it is called.
        architecture: its class.
        dtype: of its weights, as counted; with a quantization, of those that aren't quantised, and of activations.
        quantization: how most of its weights are kept; empty for none.
        parameters: their number; what is tied counts once.
        path: of the list of blocks.
        blocks: in order; () for a model that has none.
        outside: all else: embedding, final norm, head, towers for images.
        positions: most that a row may have; None where the config sets no bound.
        adapters: bytes of LoRA layers, which are among the weights of their parts.
        measured: whether activations and caches were measured in a forward on meta; else they are estimates.
    """

    model: str
    architecture: str
    dtype: str
    quantization: str
    parameters: int
    path: str
    blocks: tuple[Part, ...]
    outside: Part
    positions: int | None = None
    adapters: int = 0
    measured: bool = True

    @cached_property
    def weights(self) -> int:
        return self.outside.weights + sum(block.weights for block in self.blocks)

    def cache(self, rows: int, context: int) -> int:
        return sum(part.cache(rows, context) for part in (self.outside, *self.blocks))


def widest(parts: Iterable[Part]) -> int:
    """Bytes for each token at the worst moment of parts that run one after another: the stream and its copies, and
    what the hungriest part makes.

    A write keeps the value it replaces, and a block reads its input while it makes its output: four of the stream.
    """
    every = list(parts)
    return max((part.work_token for part in every), default=0) + 4 * max(
        (part.output_token for part in every), default=0
    )
