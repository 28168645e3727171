"""For load balancers and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from interpose.errors import Forbidden
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..auth import identify
from ..broker.accounts import Key
from ..parts import Parts
from ..reaching import ANSWERS_S
from ..tasks import within

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The process answers")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Jobs can be taken: broker, blob store and a model; else 503", response_model=None)
async def readyz(request: Request) -> Response:
    """A model that is loaded on demand will do. The answer may be a second old, as anybody may ask."""
    parts = Parts.of(request)
    if parts.stopping.is_set():
        return JSONResponse({"status": "stopping"}, 503)
    found = await parts.reached()
    body = {"status": found.status, "ready": found.ready, "models": len(found.models)}
    return JSONResponse(body, 200 if found.status == "ok" else 503)


@router.get("/metrics", summary="Prometheus figures; an admin's key unless the server opens them")
async def metrics(request: Request) -> Response:
    """Where they are open, what comes from broker and store may be a second old. Without those two it has what this
    process knows, after a few seconds; but whoever needs a key has to wait for the broker."""
    parts = Parts.of(request)
    if parts.settings.metrics_open:
        figures = await parts.figures()
    elif (await _identified(request)).admin:
        figures = await parts.figures(fresh_s=0)
    else:
        raise Forbidden("figures need an admin's key")
    parts.metrics.note(figures)
    parts.metrics.blob_cap.set(parts.settings.blob_bytes)
    return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4")


async def _identified(request: Request) -> Key:
    """As `identify`. Raises RedisTimeoutError: the broker, which knows the keys, hangs."""
    try:
        return await within(ANSWERS_S, identify(request))
    except TimeoutError:
        raise RedisTimeoutError("the broker doesn't answer") from None
