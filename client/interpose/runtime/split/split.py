"""A model whose blocks lie on shards, as home knows it."""

from __future__ import annotations

from dataclasses import dataclass

from .route import Route
from .sites import Sites


@dataclass(frozen=True)
class Split:
    """Attributes:
    route: the way to the shards.
    sites: where the modules of the model are.
    """

    route: Route
    sites: Sites

    @property
    def last(self) -> int:
        """The last block's number."""
        return len(self.sites.numbers)
