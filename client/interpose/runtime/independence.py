"""Does what a row gets depend on its neighbours, or on who came before? Measured at load, never assumed.

Some models do: rotary positions rescaled by the longest row, activations quantized by the batch's largest value.
Their jobs run alone, with the model's mutable state put back before each run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ShapeMismatch
from ..graph.manifest import BATCH, BATCH_SEQ, IMAGE, SEQ, UNKNOWN, Layout, Leaf, leaf_paths
from . import nests
from .feeding import examples, places
from .inputs import Feeding, principal, vocabulary
from .pieces import Piece, joined
from .rehearsal import LARGE_BYTES, plain
from .rows import Span, View

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference at one position, in norm and relative, that reassociation of sums may explain."""

LENGTH_BOUND = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies depend on the longest row."""

_THRESHOLDS = ("original_max_position_embeddings", "sliding_window", "attention_chunk_size")
_SHORT, _LONG, _LONGEST = 12, 24, 4096
_FLOPS = {"cpu": 4e10, "cuda": 4e13}
"""What one row of the check may cost, by kind of device."""

_REMEMBERS = {"rope_deltas"}
"""State kept by modules without buffers: where the last images moved the positions after them."""


class Buffers:
    """A model's mutable state as it was when this was made; entering and leaving put it back.

    Restored are buffers, and plain numbers and tensors kept beside them as attributes, such as the length up to
    which rotary frequencies were computed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_State(module) for module in model.modules() if _stateful(module)]

    def restore(self) -> None:
        for module in self._modules:
            module.restore()

    def __enter__(self) -> Buffers:
        self.restore()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def remembers(model: nn.Module) -> bool:
    """Whether there is anything that a model might change for later forwards."""
    return any(map(_stateful, model.modules()))


def _stateful(module: nn.Module) -> bool:
    return bool(module._buffers) or bool(_REMEMBERS & {*vars(module)})


class _State:
    """One module's."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = dict(module._buffers)
        self._beside = {name: value for name, value in vars(module).items() if plain(value)}
        tensors = {id(value): value for value in (*self._buffers.values(), *self._beside.values())}
        self._copies = [
            (value, value._version, value.detach().clone())
            for value in tensors.values()
            if isinstance(value, Tensor) and value.nbytes <= LARGE_BYTES
        ]

    def restore(self) -> None:
        attributes, buffers = vars(self._module), self._module._buffers
        # Written only where changed: an ordinary model may be in the middle of another batch's forward.
        for name in [name for name in buffers if name not in self._buffers]:
            del buffers[name]
        for name, buffer in self._buffers.items():
            if buffers.get(name) is not buffer:
                buffers[name] = buffer
        for name, value in self._beside.items():
            if attributes.get(name) is not value:
                attributes[name] = value
        self._copies = [_rewound(*entry) for entry in self._copies]


def _rewound(value: Tensor, version: int, copy: Tensor) -> tuple[Tensor, int, Tensor]:
    # The version counter tells whether anything was written, so that nothing is copied for nothing.
    if value._version != version:
        with torch.no_grad():
            value.copy_(copy)
    return value, value._version, copy


def leaves_no_trace(model: nn.Module) -> bool:
    """Whether a forward keeps nothing in the model that another one reads, so that several may be under way."""
    if length_bound(getattr(model, "config", None)):
        return False
    return not any(_REMEMBERS & {*vars(module)} for module in model.modules())


def rope_settings(config: Any) -> list[Mapping[str, Any]]:
    """Every set of rotary parameters a config holds: one, or one for each type of layer, or none."""

    def search(value: Any) -> Iterator[Mapping[str, Any]]:
        if isinstance(value, Mapping):
            if "rope_type" in value:
                yield value
            for item in value.values():
                yield from search(item)

    return list(search(config.to_dict())) if config is not None else []


def length_bound(config: Any) -> bool:
    """Whether the config names positions that depend on the longest row."""
    return any(settings["rope_type"] in LENGTH_BOUND for settings in rope_settings(config))


def thresholds(config: Any) -> list[int]:
    """Lengths at which the config says something changes, ascending."""

    def search(value: Any, names: Sequence[str]) -> Iterator[int]:
        for name, item in value.items():
            if isinstance(item, Mapping):
                yield from search(item, names)
            elif name in names and isinstance(item, int) and item > 1:
                yield item

    if config is None:
        return []
    # Dynamic scaling starts at the length the model was trained on; for others that one is a plain limit.
    extra = ("max_position_embeddings",) if length_bound(config) else ()
    return sorted(set(search(config.to_dict(), (*_THRESHOLDS, *extra))))


class Verdict(NamedTuple):
    """Whether rows are independent; a note for people: what differed, or what was checked; and why rows of one run
    must be equally long, if they must."""

    independent: bool
    note: str
    even_rows: str = ""


@torch.no_grad()
def check(
    model: nn.Module,
    feeding: Feeding,
    device: torch.device,
    longest: int | None,
    layout: Layout = None,
    parameters: int | None = None,
) -> Verdict:
    """Compare a short prompt alone, beside a longer one, after one, and padded; with images where it takes any.

    Args:
        longest: most positions a row may have; thresholds beyond it don't matter.
        layout: of the model's output; without one its principal tensor is [rows, positions, ...].
        parameters: how many it has, where some lie elsewhere.
    """
    if not feeding.works:
        return Verdict(False, f"not checked: {feeding.note}")
    mixing = [path for path, leaf in leaf_paths(layout) if _mixes(leaf)]
    if mixing:
        return Verdict(False, f"its output {mixing[0][-1]} has a value for every pair of a row and an image")
    config = getattr(model, "config", None)
    limit = longest or 1 << 62
    reachable = [length for length in thresholds(config) if length < limit]
    affordable = min(_affordable(model, device, parameters), limit)
    lengths = sorted({min(_LONG, limit), *(min(2 * at, affordable) for at in reachable if at < affordable)})
    short = max(2, min([_SHORT, *(at - 1 for at in reachable), limit]))
    trials = [examples(model, feeding, [short, length]) for length in lengths if feeding.ids]
    if not feeding.ids:
        trials = [examples(model, feeding, [0, 0])]
    elif feeding.image_token is not None:
        length = places(model, feeding)
        trials.append(examples(model, feeding, [length + 4, length + 9], [1, 1]))
    buffers = Buffers(model)
    strayed, even_rows = 0.0, ""
    for pair in trials:
        trial = _Trial(model, feeding, device, buffers, pair, layout)
        reason = trial.differs()
        if reason:
            return Verdict(False, reason)
        strayed = max(strayed, trial.strayed)
        even_rows = even_rows or trial.moved_by_padding()
    first = trial.alone[0]
    precise = torch.finfo(first.dtype).bits >= 32 if first.is_floating_point() else False
    unchecked = [at for at in reachable if at >= affordable or not precise]
    if unchecked and length_bound(config):
        note = f"its positions depend on the longest row from {unchecked[0]} tokens on, more than could be checked"
        return Verdict(False, note)
    beside = f"rows of {' and '.join(map(str, lengths))} tokens" if feeding.ids else "another row"
    return Verdict(True, f"checked beside {beside}: neighbours move results by {strayed:.0e} at most", even_rows)


def _mixes(leaf: Leaf) -> bool:
    return sum(map(leaf.dims.count, (BATCH, BATCH_SEQ, IMAGE))) > 1 and UNKNOWN not in leaf.dims


def _affordable(model: nn.Module, device: torch.device, parameters: int | None) -> int:
    """Longest row the check runs: bounded by operations and by the size of the logits."""
    size = sum(param.numel() for param in model.parameters()) if parameters is None else parameters
    by_flops = _FLOPS.get(device.type, 4e10) / (2 * size + 1)
    by_logits = (128 << 20) / (vocabulary(model) or 1)
    return int(max(_LONG, min(_LONGEST, by_flops, by_logits)))


class _Trial:
    """A short row and a longer one, as neighbours in every way they may be."""

    def __init__(
        self,
        model: nn.Module,
        feeding: Feeding,
        device: torch.device,
        buffers: Buffers,
        pair: Sequence[Piece],
        layout: Layout,
    ) -> None:
        self._model, self._feeding, self._device, self._buffers = model, feeding, device, buffers
        self._short, self._long = pair
        self._layout = layout
        with buffers:
            self.alone = self._run([[self._short]], 0)
        self.strayed = 0.0

    def _run(self, runs: list[list[Piece]], start: int) -> list[Tensor]:
        """The first row's part of all outputs that belong to rows; its tokens begin at `start`."""
        inputs = joined(runs, self._feeding.inputs, self._device)
        output = self._model(**self._feeding.kwargs(inputs))
        rows, width = inputs.input_ids.shape
        count = self._images(self._short)
        whole = Span.whole(rows, width, width, sum(self._images(piece) for run in runs for piece in run))
        length = len(runs[0][0].rows[0])
        part = Span(0, 1, start, length, start, length, 0, count)
        return [View(leaf, part, whole).cut(tensor) for leaf, tensor in self._outputs(output)]

    def _images(self, piece: Piece) -> int:
        found = piece.tensors.get(self._feeding.images)
        return 0 if found is None else len(found)

    def _outputs(self, output: Any) -> list[tuple[Leaf, Tensor]]:
        found = []
        for path, leaf in leaf_paths(self._layout):
            if leaf.by_rows:
                try:
                    tensor = nests.at(output, path)
                except LookupError:
                    continue
                found += [(leaf, tensor)] if isinstance(tensor, Tensor) else []
        if found:
            return found
        tensor = principal(output)
        return [(Leaf((BATCH, SEQ, *tensor.shape[2:]), "float32"), tensor)]

    def differs(self) -> str:
        """Which neighbour changes the short row, or ""."""
        here, there = self._named(self._short), self._named(self._long)
        with self._buffers:
            if not self._same([[self._short], [self._long]]):
                return f"a row of {here} changes beside one of {there}"
        with self._buffers:
            self._model(**self._feeding.kwargs(joined([[self._long]], self._feeding.inputs, self._device)))
            if not self._same([[self._short]]):
                return f"a row of {here} changes after one of {there}"
        return ""

    def moved_by_padding(self) -> str:
        """What padding on the left changes, or ""."""
        short, long = len(self._short.rows[0]), len(self._long.rows[0])
        if short == long:
            return ""
        with self._buffers:
            if not self._same([[self._short, self._long]], long - short):
                return f"a row of {short} tokens changes when it is padded on the left to {long}"
        return ""

    def _named(self, piece: Piece) -> str:
        return f"{len(piece.rows[0])} tokens" if self._feeding.ids else "images"

    def _same(self, runs: list[list[Piece]], start: int = 0) -> bool:
        try:
            found = self._run(runs, start)
        except ShapeMismatch:
            return False
        return len(found) == len(self.alone) and all(map(self._close, found, self.alone))

    def _close(self, found: Tensor, alone: Tensor) -> bool:
        if found.shape != alone.shape:
            return False
        # By norm, as single figures of a deep model in half precision stray further.
        expected = alone.double()
        strayed = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
        self.strayed = max(self.strayed, float(strayed.max()))
        return bool((strayed <= TOLERANCE.get(found.dtype, 0.0)).all())
