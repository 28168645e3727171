"""Bounds on one job. A server states its own in the manifest; a local run has none to speak of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import LimitExceeded


@dataclass(frozen=True, slots=True)
class Limits:
    """Attributes count, or are in the unit their name ends with.

    nodes, runs, invokes, rows, tokens: of one job; tokens are rows times the longest row.
    new_tokens: a generation may add to a row.
    payload_bytes: of the submission, inline attachments included.
    attachments, attachment_bytes: number; size of each.
    result_bytes: all saves of the job together.
    memory_bytes: what its values may take while it runs, beyond the model's own; on a split model, in each process.
    flops: floating-point operations of its own nodes, beyond the model's; on a split model, of all processes.
    wall_s: seconds from its start on a worker.
    """

    nodes: int = 20_000
    runs: int = 1_000
    invokes: int = 4_096
    rows: int = 4_096
    tokens: int = 131_072
    new_tokens: int = 4_096
    payload_bytes: int = 32 << 20
    attachments: int = 1_024
    attachment_bytes: int = 1 << 30
    result_bytes: int = 2 << 30
    memory_bytes: int = 8 << 30
    flops: int = 10**14
    wall_s: float = 600.0

    def check(self, name: str, asked: int) -> None:
        """Raises LimitExceeded, with both figures, if `asked` is over the limit of that name."""
        allowed = getattr(self, name)
        if asked > allowed:
            # Python refuses to write out numbers of thousands of digits, and products of sizes get there.
            figure = f"{asked:,}" if asked < 10**30 else "more than 10^30"
            raise LimitExceeded(
                f"{name}: {figure} asked for, {allowed:,} allowed",
                # What was asked for may be beyond any number that msgpack can carry.
                details={"limit": name, "asked": min(asked, 2**63 - 1), "allowed": allowed},
            )

    @classmethod
    def stated(cls, limits: Mapping[str, Any]) -> Limits:
        """The limits a manifest states; what it leaves out, or this version doesn't know, has no bound here."""
        known = {field.name for field in fields(cls)}
        told = {name: value for name, value in limits.items() if name in known and type(value) in (int, float)}
        return replace(UNLIMITED, **told)

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


UNLIMITED = Limits(
    nodes=1 << 40,
    runs=1 << 40,
    invokes=1 << 40,
    rows=1 << 40,
    tokens=1 << 50,
    new_tokens=1 << 40,
    payload_bytes=1 << 60,
    attachments=1 << 40,
    attachment_bytes=1 << 60,
    result_bytes=1 << 60,
    memory_bytes=1 << 60,
    flops=1 << 90,
    wall_s=float("inf"),
)
"""For local runs: the machine is the user's own."""
