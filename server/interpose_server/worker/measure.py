"""What a loaded model's forwards take on this machine, found by running some, a second or two at load.

Forwards of ever more rows are timed until a doubling no longer makes rows cheaper, or memory or the time given says
stop. That gives the scheduler its budget: more rows in one forward make everybody wait and nothing faster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from interpose.graph.manifest import BATCH, BATCH_SEQ, SEQ, Layout, Leaf, Manifest, leaves
from interpose.graph.values import TensorSpec
from interpose.runtime import nests
from interpose.runtime.feeding import examples, places
from interpose.runtime.loading import Loaded
from interpose.runtime.pieces import joined
from torch import Tensor

from .cost import Cost, line
from .memory import free_bytes

log = logging.getLogger(__name__)

LENGTH = 16
"""Tokens of each row. Shorter than most prompts, so that what a forward costs beside its tokens shows."""

LEAST = 256
"""Tokens below which nothing counts as the end of what more rows gain. Others use the machine too: to take a slow
moment for that end would cost far more than to miss it."""

GAIN = 0.05
"""A doubling of rows that makes tokens less than this much cheaper is the last."""

TWICE = 2
"""Doublings in a row that must gain nothing."""

ROWS = 8
"""So many are tried whatever time it takes: from less, nothing can be told."""

PART = 0.4
"""Of the free memory, what a batch may take. Another is made ready meanwhile, and allocators need room."""

SHORT_S = 0.1

STEPS = 4
"""Rows of the wider of two generations whose steps are timed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Attributes:
    tokens: of a forward beyond which rows get no cheaper; None where growth ended before.
    memory_bytes: what a batch may take.
    points: (tokens, seconds) of the forwards timed.
    why: what ended the growth: "knee", "memory" or "time".
    took_s: the measurement itself.
    """

    tokens: int | None
    memory_bytes: int
    cost: Cost
    points: tuple[tuple[int, float], ...] = ()
    why: str = ""
    took_s: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        """For people: milliseconds, megabytes."""
        cost = self.cost
        return {
            "tokens": self.tokens,
            "memory_mb": self.memory_bytes >> 20,
            "forward_ms": round(cost.forward_s * 1e3, 3),
            "token_ms": round(cost.token_s * 1e3, 5),
            "step_ms": round(cost.step_s * 1e3, 3),
            "row_ms": round(cost.row_s * 1e3, 4),
            "token_kb": cost.token_bytes >> 10,
            "cache_kb": round(cost.cache_bytes / 1024, 2),
            "ended_by": self.why,
            "took_s": round(self.took_s, 2),
        }


@torch.no_grad()
def measure(loaded: Loaded, seconds: float, room: int | None = None) -> Measured:
    """Time forwards for about so many seconds; with 0, or a model nobody knows how to run, none.

    Args:
        room: bytes free on devices that this process doesn't see.
    """
    start = time.perf_counter()
    device = torch.device(loaded.device)
    token_bytes, kept_bytes = estimate(loaded.manifest)
    free = free_bytes(loaded.model)
    room = int((free if room is None else min(free, room)) * PART)
    if not loaded.feeding.works or seconds <= 0:
        return Measured(None, room, Cost(token_bytes=token_bytes, kept_bytes=kept_bytes))
    trial = _Trial(loaded, device, start + seconds)
    points, why, taken = trial.grow(room, token_bytes)
    knee = _knee(points) if why == "knee" else None
    forward_s, token_s = line([point for point in points if knee is None or point[0] <= max(knee, points[1][0])])
    steps, cached = trial.steps() if why != "memory" else ([], 0)
    step_s, row_s = line(steps) if steps else (forward_s, token_s)
    cost = Cost(forward_s, token_s, step_s, row_s, max(token_bytes, taken), max(kept_bytes, taken), cached)
    return Measured(knee, room, cost, tuple(points), why, time.perf_counter() - start)


class _Trial:
    """Runs of one model, until a time on `perf_counter`'s clock."""

    def __init__(self, loaded: Loaded, device: torch.device, until: float) -> None:
        self._loaded = loaded
        self._device = device
        self._until = until
        self._kwargs: dict[int, Mapping[str, Tensor]] = {}
        positions = loaded.manifest.positions or LENGTH
        self.length = _fixed(loaded.manifest) or min(
            max(LENGTH, places(loaded.model, loaded.feeding) + 1), positions
        )

    def grow(self, room: int, token_bytes: int) -> tuple[list[tuple[int, float]], str, int]:
        """(tokens, seconds) of forwards of 1, 2, 4, ... rows; why it ended; bytes a token, where they are told."""
        points: list[tuple[int, float]] = []
        taken, flat, rows = token_bytes, 0, 1
        self._timed(1)  # the first forward of all is slower
        while True:
            tokens = rows * self.length
            if tokens * taken > room:
                return points, "memory", taken
            try:
                spent, peak = self._timed(rows)
            except (torch.OutOfMemoryError, MemoryError):
                return points, "memory", taken
            taken = max(peak // tokens, 0) or taken
            gained = not points or tokens <= LEAST or _rate(tokens, spent) >= (1 + GAIN) * _best(points)
            flat = 0 if gained else flat + 1
            points.append((tokens, spent))
            if flat == TWICE:
                return points, "knee", taken
            # The next takes twice as long at most, and the steps take some.
            if rows >= ROWS and time.perf_counter() + 3 * spent > self._until:
                return points, "time", taken
            rows *= 2

    def steps(self) -> tuple[list[tuple[int, float]], int]:
        """(rows, seconds) of steps of generations, and bytes a position of their cache; nothing without one."""
        model: Any = self._loaded.model
        if not getattr(model, "can_generate", bool)() or "use_cache" not in self._loaded.feeding.accepts:
            return [], 0
        try:
            found = [self._step(model, rows) for rows in (1, STEPS)]
        except Exception as error:  # noqa: BLE001 - whatever a model's own methods raise where nobody asked it to
            log.info("no step could be timed (%s)", type(error).__name__)
            return [], 0
        return [(rows, spent) for rows, spent, _ in found], found[0][2]

    def _step(self, model: Any, rows: int) -> tuple[int, float, int]:
        """As `Generation` makes them."""
        state: dict[str, Any] = {**self._given(rows), "use_cache": True}
        ids = state.pop("input_ids")
        times, cached = [], 0
        for step in range(3):
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1 if step else None, is_first_iteration=not step, **state
            )
            output, spent = self._clocked(lambda inputs=inputs: model(**inputs))  # type: ignore[misc]
            times.append(spent)
            state = model._update_model_kwargs_for_generation(output, state)
            cached = cached or _nbytes(state.get("past_key_values")) // ids.numel()
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        return rows, min(times[1:]), cached

    def _given(self, rows: int) -> Mapping[str, Tensor]:
        feeding = self._loaded.feeding
        run = examples(self._loaded.model, feeding, [self.length] * rows)
        return feeding.kwargs(joined([run], feeding.inputs, self._device))

    def _timed(self, rows: int) -> tuple[float, int]:
        """Seconds of a forward, and what it took of a GPU's memory at most; 0 where that isn't told."""
        kwargs: dict[str, Any] = dict(self._given(rows))
        if "use_cache" in self._loaded.feeding.accepts:
            kwargs["use_cache"] = False
        before = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
        times = [self._clocked(lambda: self._loaded.model(**kwargs))[1]]
        if times[0] < SHORT_S:
            # Of two the shorter: whoever else runs here makes it longer.
            times.append(self._clocked(lambda: self._loaded.model(**kwargs))[1])
        peak = torch.cuda.max_memory_allocated(self._device) - before if self._device.type == "cuda" else 0
        return min(times), peak

    def _clocked(self, work: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        found = work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return found, time.perf_counter() - start


def estimate(manifest: Manifest) -> tuple[int, int]:
    """Bytes a token of a forward at its worst moment, and of one that keeps everything for a backward.

    From the measured layouts: of every module what it gives is there at once in the second; in the first what the
    widest gives, and what it was made of.
    """
    fixed = _fixed(manifest)
    made = [_token_bytes(info.points.get("output"), fixed) for path, info in manifest.modules.items() if path]
    stream = [_token_bytes(manifest.modules[path].points.get("output"), fixed) for path in manifest.stream]
    return 2 * max(made, default=0) + 4 * max(stream, default=0), sum(made)


def _fixed(manifest: Manifest) -> int:
    """Positions of a row of a model that takes no tokens; 0 of one that does."""
    if manifest.tokens:
        return 0
    layouts = [manifest.modules[path].points.get("output") for path in manifest.stream]
    dims = [leaf.dims for layout in layouts for leaf in leaves(layout)[:1]]
    return max((dim[1] for dim in dims if len(dim) > 2 and isinstance(dim[1], int)), default=1)


def _token_bytes(layout: Layout, fixed: int) -> int:
    """Bytes that a value has for each token: what grows with the positions of a row, or their part of a row."""
    sizes = [(leaf, _numbers(leaf)) for leaf in leaves(layout)]
    grows = sum(size for leaf, size in sizes if (SEQ in leaf.dims and BATCH in leaf.dims) or BATCH_SEQ in leaf.dims)
    whole = sum(size for leaf, size in sizes if BATCH in leaf.dims and SEQ not in leaf.dims)
    return grows + (whole // fixed if fixed else 0)


def _numbers(leaf: Leaf) -> int:
    return TensorSpec(tuple(dim if isinstance(dim, int) else 1 for dim in leaf.dims), leaf.dtype).nbytes


def _nbytes(cache: Any) -> int:
    layers = getattr(cache, "layers", ())
    return sum(tensor.nbytes for layer in layers for _, tensor in nests.tensors(vars(layer)))


def _rate(tokens: int, spent: float) -> float:
    return tokens / spent


def _best(points: Sequence[tuple[int, float]]) -> float:
    return max(_rate(*point) for point in points)


def _knee(points: Sequence[tuple[int, float]]) -> int:
    """The fewest tokens of those timed that are about as cheap, each, as they get."""
    best = _best(points)
    return max(min(tokens for tokens, spent in points if _rate(tokens, spent) >= best / (1 + GAIN)), LEAST)
