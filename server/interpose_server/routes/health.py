"""For load balancers and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from interpose.errors import Forbidden
from redis.exceptions import RedisError

from ..auth import identify
from ..broker.states import ModelState
from ..parts import Parts

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The process answers")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Jobs can be taken: broker, blob store and a model; else 503", response_model=None)
async def readyz(request: Request) -> Response:
    """A model that is loaded on demand will do."""
    parts = Parts.of(request)
    if parts.stopping.is_set():
        return JSONResponse({"status": "stopping"}, 503)
    try:
        hosted = await parts.broker.models.list()
        on_demand = await parts.broker.specs.list()
    except (RedisError, OSError):
        return JSONResponse({"status": "no broker"}, 503)
    if not await parts.reaching():
        return JSONResponse({"status": "no blob store"}, 503)
    ready = sum(model.state is ModelState.READY for model in hosted)
    body = {"status": "ok" if ready or on_demand else "no model ready", "ready": ready, "models": len(hosted)}
    return JSONResponse(body, 200 if ready or on_demand else 503)


@router.get("/metrics", summary="Prometheus figures; an admin's key unless the server opens them")
async def metrics(request: Request) -> Response:
    parts = Parts.of(request)
    if not parts.settings.metrics_open and not (await identify(request)).admin:
        raise Forbidden("figures need an admin's key")
    queue = parts.broker.queue
    hosted = await parts.broker.models.list()
    known = [(model, await queue.demand(model.name), await queue.tally(model.name)) for model in hosted]
    parts.metrics.note(known)
    parts.metrics.blob_cap.set(parts.settings.blob_bytes)
    parts.metrics.blob_bytes.set(await parts.blobs.ask(parts.blobs.used))
    return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4")
