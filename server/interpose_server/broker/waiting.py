"""A queued job as the scheduler sees it. Imports nothing of Redis."""

from __future__ import annotations

from dataclasses import dataclass

from interpose.graph.footprint import Footprint


@dataclass(frozen=True, slots=True)
class Waiting:
    """`alone`: an earlier attempt's worker died, so it shares no forward now."""

    ref: str
    footprint: Footprint
    alone: bool
    created_ms: int

    @property
    def user(self) -> str:
        return self.ref.partition("/")[0]
