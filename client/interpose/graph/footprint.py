"""What a job asks of a batch: all the scheduler needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Footprint:
    """Computed by validation, kept beside the queued job.

    Attributes:
        kind: "trace" or "generate"; a session of both is "mixed".
        runs: executions of the model, one after another.
        rows: most rows of one run.
        longest: most positions of one row, new tokens included.
        tokens: rows times the longest row, summed over the runs.
        steps: new tokens a row, summed over the generations; 0 without one.
        attention: it looks inside attention, so it runs on the eager path.
        gradients: it asks for gradients, so its forwards keep what a backward needs.
        exclusive: it must run alone.
        adapters: what its runs choose, "" for the model alone; each once, in order.
        result_bytes, memory_bytes, flops: bounds from shapes alone.
    """

    kind: str = "trace"
    runs: int = 1
    rows: int = 1
    longest: int = 1
    tokens: int = 0
    steps: int = 0
    attention: bool = False
    gradients: bool = False
    exclusive: bool = False
    result_bytes: int = 0
    memory_bytes: int = 0
    flops: int = 0
    adapters: tuple[str, ...] = ("",)

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Footprint:
        known = {field.name: plain[field.name] for field in fields(cls) if field.name in plain}
        return cls(**known | {"adapters": tuple(known.get("adapters", ("",)))})
