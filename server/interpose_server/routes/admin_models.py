"""The catalogue of models, for those whose key is an admin's."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..auth import Admin
from ..models.overview import overview, take_out
from ..models.spec import ModelSpec
from ..parts import Parts

router = APIRouter(prefix="/v1/admin/models", tags=["admin"])


@router.get("", summary="All models: entry, state, copies, queue, devices, why loading failed; and all devices")
async def list_models(request: Request, _: Admin) -> dict[str, Any]:
    """`devices` is null where no cluster is heard of."""
    specs, devices = Parts.of(request).broker.specs, await Parts.of(request).broker.specs.shown()
    return {
        "models": await overview(Parts.of(request).broker),
        "kept": await specs.kept(),
        "devices": None if devices is None else devices.summary(),
    }


@router.put("", summary="Add a model to the catalogue, or replace its entry")
async def put(request: Request, spec: ModelSpec, _: Admin) -> Response:
    new = await Parts.of(request).broker.specs.put(spec)
    return JSONResponse(spec.model_dump(mode="json"), 201 if new else 200)


@router.delete("/{model:path}", status_code=202, summary="Remove a model once its jobs are over, or end them now")
async def remove(request: Request, model: str, _: Admin, now: bool = False) -> dict[str, Any]:
    return {"id": model, "ended": await take_out(Parts.of(request).broker, model, now=now)}


@router.post("/{model:path}/{verb}", status_code=202, summary="Load, evict, pin or unpin a model")
async def act(
    request: Request, model: str, verb: Literal["load", "evict", "pin", "unpin"], _: Admin
) -> dict[str, Any]:
    specs = Parts.of(request).broker.specs
    match verb:
        case "load":
            await specs.load(model)
        case "evict":
            await specs.evict(model)
        case "pin" | "unpin":
            await specs.pin(model, verb == "pin")
    return {"id": model, "verb": verb}
