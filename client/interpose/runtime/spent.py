"""What a job has used of what it may use as a whole, wherever the parts of its model lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from ..graph.limits import Limits

Told: TypeAlias = Sequence[Sequence[int]]
"""Pairs of a site and what was done there."""


class Spent:
    """Floating-point operations of a job's own nodes whose sizes no shape told before it ran.

    Each site of a split model has one of these. What it knows of the others came to it with its work, as one site
    at a time works for a job.

    Args:
        site: where it counts.
    """

    def __init__(self, limits: Limits, site: int = 0) -> None:
        self._limits = limits
        self._site = site
        self._by_site: dict[int, int] = {}

    @property
    def flops(self) -> int:
        """Of all sites, as far as it was told of them."""
        return sum(self._by_site.values())

    def add(self, flops: int) -> None:
        """Count what is about to be done here. Raises LimitExceeded if that is more than the job may do."""
        if flops:
            self._limits.check("flops", self.flops + flops)
            self._by_site[self._site] = self._by_site.get(self._site, 0) + flops

    @property
    def told(self) -> Told:
        """What others are to learn."""
        return [[site, flops] for site, flops in self._by_site.items()]

    def learn(self, told: Told) -> None:
        """What another site knows; counts only grow, so of two the larger is the newer."""
        for site, flops in told:
            self._by_site[site] = max(self._by_site.get(site, 0), flops)
