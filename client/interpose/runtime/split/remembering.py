"""What a split model remembers from one forward to the next, put back at home and on every shard.

Only where rows depend on that: of a model that was measured to be independent of it, shards aren't asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..independence import Buffers
from .shard import FORGET, HOLD, RESTORE

if TYPE_CHECKING:
    from ..loading import Loaded


class Remembered(Buffers):
    """The mutable state of home and its shards as it was when this was made. Used while no forward is under way."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded.model)
        split = loaded.split
        asked = split is not None and not loaded.manifest.row_independent
        self._route = split.route if split is not None and asked else None
        sites = sorted(set(self._route.sites.values())) if self._route is not None else ()
        self._held = {site: number for site in sites if (number := self._errand(site, HOLD, None)) is not None}

    def restore(self) -> None:
        super().restore()
        for site, number in self._held.items():
            self._errand(site, RESTORE, number)

    def forget(self) -> None:
        """It won't be put back any more."""
        for site, number in self._held.items():
            self._errand(site, FORGET, number)
        self._held.clear()

    def _errand(self, site: int, name: str, number: int | None) -> int | None:
        assert self._route is not None
        found: int | None = self._route.errand(site, name, number)
        return found
