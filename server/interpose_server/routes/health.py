"""For load balancers and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from interpose.errors import Forbidden

from ..auth import identify
from ..metrics import count
from ..parts import Parts

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
    """Where they are open, what comes from broker and store may be a second old."""
    parts = Parts.of(request)
    if parts.settings.metrics_open:
        figures = await parts.figures()
    elif (await identify(request)).admin:
        figures = await count(parts.broker, parts.blobs)
    else:
        raise Forbidden("figures need an admin's key")
    parts.metrics.note(figures)
    parts.metrics.blob_cap.set(parts.settings.blob_bytes)
    return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4")
