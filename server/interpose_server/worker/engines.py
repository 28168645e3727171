"""From a model's spec to an engine that runs it: placed, loaded, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from interpose.graph.manifest import Manifest
from interpose.runtime.engine import Engine
from interpose.runtime.independence import leaves_no_trace
from interpose.runtime.loading import Loaded, load

from ..models.spec import ModelSpec, Placement
from ..settings import Settings
from .budget import budget
from .measure import Measured, measure
from .scheduler import Budget


@dataclass(frozen=True, slots=True)
class Ready:
    """An engine, and what has to be told of it.

    Attributes:
        device: where tensors that come with jobs go.
        tokenizer: its file's bytes, None without one.
        allowed: what a batch may hold.
        lanes: how many batches are best under way at once; each may hold its share of the memory.
        check: raises if the model can't go on in this process; called after every batch, and now and then, from any
            thread.
    """

    engine: Engine
    manifest: Manifest
    device: torch.device
    tokenizer: bytes | None
    allowed: Budget
    measured: Measured
    lanes: int = 1
    check: Callable[[], None] = lambda: None

    @property
    def lane(self) -> Budget:
        """What the batch of one lane may hold."""
        return replace(self.allowed, memory_bytes=self.allowed.memory_bytes // self.lanes)


def engine_for(spec: ModelSpec, settings: Settings, device: str | None = None) -> Ready:
    """Load a model as its spec places it; blocks until it can run jobs.

    Args:
        device: overrides where the spec puts it: "cpu", "cuda:1", ...

    Raises:
        ConfigError: it can't be served as asked, however often it is tried.
        ModelUnavailable: its weights don't come.
    """
    _share(spec)
    loaded = load(
        spec.place,
        name=spec.name,
        device=device or _device(spec),
        dtype=spec.dtype,
        revision=spec.revision,
        quantization=spec.quantization,
        adapters=spec.adapters,
    )
    return ready(loaded, settings)


def ready(loaded: Loaded, settings: Settings, *, room: int | None = None, lanes: int = 1) -> Ready:
    """A loaded model, measured, and the engine for it.

    Args:
        room: bytes free on devices that this process doesn't see.
        lanes: of `Ready`; one, whatever is asked, where a forward changes what the next one computes.
    """
    shared = loaded.manifest.row_independent
    measured = measure(loaded, settings.measure_s, room)
    allowed = budget(measured, settings, shared=shared)
    return Ready(
        engine=Engine(loaded, allowed.most),
        manifest=replace(loaded.manifest, limits=settings.limits.as_dict()),
        device=torch.device(loaded.device),
        tokenizer=loaded.tokenizer_bytes,
        allowed=allowed,
        measured=measured,
        lanes=lanes if shared and leaves_no_trace(loaded.model) else 1,
    )


def _device(spec: ModelSpec) -> str | None:
    """What `load` takes: "auto" for all devices this process sees, None for the best one."""
    several = spec.placement is Placement.DEVICES or (spec.devices or 0) > 1
    if several and torch.cuda.device_count() > 1:
        return "auto"
    return "cpu" if spec.devices == 0 else None


def _share(spec: ModelSpec) -> None:
    """A part of a device is a part of its memory too: others have the rest."""
    if spec.devices is not None and 0 < spec.devices < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(spec.devices)
