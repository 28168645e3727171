"""The gateway: an app made of its parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI

from . import problems
from .blobs import Blobs
from .broker.connect import Broker
from .catalogue import Catalogue
from .handshake import Handshake
from .limits import RateLimit
from .metrics import Metrics, count
from .notifier import Notifier
from .parts import Parts
from .positions import Positions
from .reaching import ANSWERS_S, FRESH_S, STORED_FRESH_S, look, reaches
from .recent import Recent
from .routes import admin, admin_models, health, jobs, me, models, pages, stream, tensors
from .settings import Settings
from .streams import Open
from .sweeper import sweep_forever
from .tasks import end

ROUTERS = (jobs, models, tensors, me, admin, admin_models, stream, health, pages)


def create_app(settings: Settings, broker: Broker, blobs: Blobs) -> FastAPI:
    """The app over a broker and a blob store, both of which stay the caller's to close."""
    metrics = Metrics()
    stored = Recent(partial(reaches, blobs), STORED_FRESH_S, ANSWERS_S)
    used = Recent(partial(blobs.ask, blobs.used), 0.0, ANSWERS_S)
    parts = Parts(
        settings=settings,
        broker=broker,
        blobs=blobs,
        catalogue=Catalogue(broker.models, broker.specs),
        notifier=Notifier(broker),
        positions=Positions(broker.queue, settings.position_s),
        reached=Recent(partial(look, broker, stored), FRESH_S),
        figures=Recent(partial(count, broker, used), FRESH_S),
        stopping=asyncio.Event(),
        rate=RateLimit(settings.rate_per_s, settings.rate_burst),
        metrics=metrics,
        open_streams=Open(
            settings.streams_per_user,
            metrics.streams,
            "{most} streams are open, the most allowed; one carries any number of jobs",
        ),
        open_downloads=Open(
            settings.downloads_per_user, metrics.downloads, "{most} downloads are under way, the most allowed"
        ),
    )
    app = FastAPI(title="Interpose", version=version("interpose"), lifespan=_background)
    app.state.parts = parts
    app.add_middleware(Handshake, protocols=settings.protocols, metrics=metrics)
    problems.install(app)
    for module in ROUTERS:
        app.include_router(module.router)
    return app


@asynccontextmanager
async def _background(app: FastAPI) -> AsyncIterator[None]:
    """The notifier and the sweeper, as long as the app runs."""
    parts: Parts = app.state.parts
    tasks = [
        asyncio.create_task(parts.notifier.run()),
        asyncio.create_task(sweep_forever(parts.settings, parts.broker, parts.blobs)),
    ]
    try:
        yield
    finally:
        await end(tasks)
