"""What the routes of one app share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from .blobs import Blobs
from .broker.connect import Broker
from .catalogue import Catalogue
from .limits import RateLimit
from .metrics import Figures, Metrics
from .notifier import Notifier
from .positions import Positions
from .reaching import Reached
from .recent import Recent
from .settings import Settings
from .streams import Open


@dataclass(frozen=True, slots=True)
class Parts:
    settings: Settings
    broker: Broker
    blobs: Blobs
    catalogue: Catalogue
    notifier: Notifier
    positions: Positions
    reached: Recent[Reached]
    figures: Recent[Figures]
    stopping: asyncio.Event
    """Set once the process is about to end: it serves on for a while, but nobody should come any more."""
    rate: RateLimit
    metrics: Metrics
    open_streams: Open
    open_downloads: Open

    @staticmethod
    def of(connection: HTTPConnection) -> Parts:
        return Parts.in_app(connection.app)

    @staticmethod
    def in_app(app: Starlette) -> Parts:
        parts = app.state.parts
        assert isinstance(parts, Parts)
        return parts
