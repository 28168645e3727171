"""Models: which are served, their manifests, their tokenizers."""

from __future__ import annotations

from typing import Any

import msgpack
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from interpose.errors import NotFound
from interpose.wire.protocol import MSGPACK

from .. import blob_keys
from ..auth import User, allow
from ..blobs import whole
from ..parts import Parts

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", summary="Models this key may use")
async def list_models(request: Request, user: User) -> dict[str, list[dict[str, Any]]]:
    found = await Parts.of(request).broker.models.list()
    return {"models": [hosted.to_plain() for hosted in found if user.allows(hosted.name)]}


@router.get("/{model:path}/tokenizer", summary="The model's tokenizer.json")
async def tokenizer(request: Request, model: str, user: User) -> Response:
    allow(user, model)
    parts = Parts.of(request)
    hosted = await parts.catalogue.get(user, model)
    mark = f'"{hosted.tokenizer}"'
    if hosted.tokenizer and request.headers.get("if-none-match") == mark:
        return Response(status_code=304, headers={"ETag": mark})
    key = blob_keys.tokenizer(hosted.tokenizer)
    data = await parts.blobs.run(lambda: whole(parts.blobs, key)) if hosted.tokenizer else None
    if data is None:
        raise NotFound(f"{model} has no tokenizer here; give it token ids")
    return Response(bytes(data), media_type="application/json", headers={"ETag": mark})


@router.get(
    "/{model:path}",
    summary="The model's manifest: msgpack if asked for, else JSON; 503 while it is loaded for the first time",
)
async def manifest(request: Request, model: str, user: User) -> Response:
    allow(user, model)
    parts = Parts.of(request)
    hosted = await parts.catalogue.get(user, model)
    await parts.catalogue.known(hosted)
    mark = f'"{hosted.fingerprint}"'
    headers = {"ETag": mark, "Vary": "Accept", "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") in (mark, hosted.fingerprint):
        return Response(status_code=304, headers=headers)
    raw = await parts.broker.models.manifest(model)
    if MSGPACK in request.headers.get("accept", ""):
        return Response(raw, media_type=MSGPACK, headers=headers)
    return JSONResponse(msgpack.unpackb(raw), headers=headers)
