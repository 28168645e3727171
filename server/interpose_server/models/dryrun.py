"""Forwards of a model on meta: what its blocks make and keep, told by the shapes alone."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from interpose.runtime import nests
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHORT, LONG = 8, 32
"""Positions of the two rows: what grows between them is each position's. Short enough for what grows with the
square to count little, as a fused attention never has it in memory."""


@dataclass(frozen=True)
class Kept:
    """A layer of a cache: bytes of each position, bytes a row has anyway, most positions it holds."""

    token: int = 0
    row: int = 0
    window: int | None = None


@dataclass(frozen=True)
class Dry:
    """Attributes:
    work, output: of each block, bytes for each position: what it makes on the way, what it hands on.
    outside: bytes for each position that are made outside the blocks, such as logits.
    cache: a layer for each block, or whatever layers there are.
    """

    work: tuple[int, ...]
    output: tuple[int, ...]
    outside: int
    cache: tuple[Kept, ...]

    def with_adapter(self, its: Dry) -> Dry:
        """For forwards with or without it. Args: its: of the same model with an adapter."""
        work = tuple(map(max, self.work, its.work))
        return Dry(work, self.output, max(self.outside, its.outside), self.cache)

    def scaled(self, size: int, by: int) -> Dry:
        """For numbers of another size, in bytes."""

        def scale(value: int) -> int:
            return -(-value * size // by)

        return Dry(
            tuple(map(scale, self.work)),
            tuple(map(scale, self.output)),
            scale(self.outside),
            tuple(Kept(scale(layer.token), scale(layer.row), layer.window) for layer in self.cache),
        )


@torch.no_grad()
def dry_run(model: nn.Module, blocks: Sequence[nn.Module], device: str = "meta") -> Dry:
    """Raises whatever a model's own code raises where it looks at values, which aren't there."""
    with torch.device(device):
        short, _ = _caches(model(**_given(model, SHORT)))
        watch = _Watch(model, blocks)
        with watch:
            output = model(**_given(model, LONG))
        long, kept_bytes = _caches(output)
    positions = max(watch.positions, 1)
    return Dry(
        work=tuple(-(-peak // positions) for peak in watch.peaks),
        output=tuple(-(-size // positions) for size in watch.outputs),
        outside=max(watch.outside - kept_bytes, 0) // positions,
        cache=tuple(_growth(*pair) for pair in zip(short, long, strict=True)),
    )


def _given(model: Any, length: int) -> dict[str, Any]:
    """Inputs of one row."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    ids = torch.zeros(1, length, dtype=torch.long)
    given: dict[str, Any] = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    if model.can_generate():
        given["use_cache"] = True
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in given.items() if name in accepted}


_Layer = tuple[int, int | None]
"""Bytes of a cache's layer, and the most positions it holds."""


def _caches(output: Any) -> tuple[list[_Layer], int]:
    """The layers of what a forward kept for the next, and all their bytes."""
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        cache = getattr(output, "cache_params", None)
    pairs = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    layers = [layer for one in (cache, *pairs) for layer in getattr(one, "layers", ())]
    found = [(_nbytes(vars(layer)), getattr(layer, "sliding_window", None)) for layer in layers]
    return found, sum(size for size, _ in found)


def _nbytes(held: Mapping[str, Any]) -> int:
    return sum(tensor.nbytes for _, tensor in nests.tensors(held))


def _growth(short: _Layer, long: _Layer) -> Kept:
    window = long[1]
    # What a window of n positions keeps is the n - 1 before the next.
    most = window - 1 if window is not None else None
    few, many = (min(length, most or length) for length in (SHORT, LONG))
    if many <= few:
        return Kept(-(-long[0] // many), 0, most)
    token = (long[0] - short[0]) // (many - few)
    return Kept(token, max(long[0] - token * many, 0), most if token else None)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of tensors that are alive, of those made while it watches.

    Attributes:
        now, peak: bytes, and the most there have been since somebody set it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def know(self, tensor: Tensor) -> None:
        """One that was there before, and doesn't count."""
        self._seen.add(tensor.untyped_storage()._cdata)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _Watch:
    """What one forward takes: in each block, and outside them.

    Attributes:
        peaks: of each block, bytes it had in memory at its worst moment beyond what was there when it began.
        outputs: bytes of the hidden states each handed on.
        outside: bytes at the worst moment outside the blocks, a cache that has grown meanwhile included.
        positions: of the hidden states.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.peaks = [0] * len(blocks)
        self.outputs = [0] * len(blocks)
        self.outside = self.positions = 0
        self._live = _Live()
        self._model = model
        self._blocks = blocks
        self._handles: list[Any] = []
        self._begun = 0

    def __enter__(self) -> None:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._live.know(tensor)
        for index, block in enumerate(self._blocks):
            self._handles += [
                block.register_forward_pre_hook(self._enter(index)),
                block.register_forward_hook(self._leave(index)),
            ]
        self._live.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self.outside = max(self.outside, self._live.peak)
        if not self._blocks:
            self.positions = LONG

    def _enter(self, index: int) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self.outside = max(self.outside, self._live.peak)
            self._begun = self._live.peak = self._live.now

        return enter

    def _leave(self, index: int) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            hidden = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            self.peaks[index] = max(self.peaks[index], self._live.peak - self._begun)
            self.outputs[index] = hidden.nbytes
            self.positions = max(self.positions, hidden.numel() // hidden.shape[-1])
            self._live.peak = self._live.now

        return leave
