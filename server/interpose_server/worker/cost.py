"""What a model's forwards take, in seconds and bytes, as measured at load: what the scheduler decides by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from interpose.graph.footprint import Footprint

BACKWARD = 3
"""A forward and its backward take so many times the forward: two products for each of its own."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Zeros where nothing was measured.

    Attributes:
        forward_s, token_s: a forward takes so long, and so much more for each token; padding counts as tokens.
        step_s, row_s: a step of a generation, and each row of it.
        token_bytes: what each token of a forward takes while it runs.
        kept_bytes: the same where everything is kept that a backward needs.
        cache_bytes: what each position takes in a generation's cache.
    """

    forward_s: float = 0.0
    token_s: float = 0.0
    step_s: float = 0.0
    row_s: float = 0.0
    token_bytes: int = 0
    kept_bytes: int = 0
    cache_bytes: int = 0

    def forward(self, tokens: int, *, gradients: bool = False) -> float:
        """Seconds of one forward."""
        return (self.forward_s + self.token_s * tokens) * (BACKWARD if gradients else 1)

    def step(self, rows: int) -> float:
        """Seconds of one step of a generation."""
        return self.step_s + self.row_s * rows

    def alone(self, job: Footprint) -> float:
        """Seconds of a job by itself, if each of its runs takes a forward of its own."""
        tokens = job.tokens or job.runs * job.rows * job.longest
        forwards = job.runs * self.forward_s + tokens * self.token_s
        return forwards * (BACKWARD if job.gradients else 1) + job.steps * self.step(job.rows)


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(a, b) of the line a + b * x near points (x, seconds): by least squares of relative errors, neither negative.

    A short forward's milliseconds count as much as a long one's seconds.
    """
    if not points:
        return 0.0, 0.0
    weights = [1 / max(y, 1e-9) ** 2 for _, y in points]
    total = sum(weights)
    x0 = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y0 = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    if not spread:
        return y0, 0.0
    slope = sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True)) / spread
    slope = min(max(slope, 0.0), y0 / x0) if x0 else max(slope, 0.0)
    return y0 - slope * x0, slope
