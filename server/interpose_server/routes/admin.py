"""Keys, for those whose own key is an admin's."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from ..auth import Admin
from ..parts import Parts

router = APIRouter(prefix="/v1/admin", tags=["admin"])


class NewKey(BaseModel):
    """Attributes: models: what the key may use; empty for all."""

    model_config = ConfigDict(extra="forbid")

    user: str = Field(max_length=64)
    admin: bool = False
    models: list[str] = Field(default_factory=list, max_length=256)


@router.post("/keys", status_code=201, summary="Make a key; its token is shown this once")
async def create(request: Request, wanted: NewKey, _: Admin) -> dict[str, Any]:
    accounts = Parts.of(request).broker.accounts
    token, key = await accounts.create(wanted.user, admin=wanted.admin, models=tuple(wanted.models))
    return {**key.to_plain(), "token": token}


@router.get("/keys", summary="All keys, without their tokens")
async def list_keys(request: Request, _: Admin) -> dict[str, Any]:
    return {"keys": [key.to_plain() for key in await Parts.of(request).broker.accounts.list()]}


@router.delete("/keys/{key_id}", status_code=204, summary="Revoke a key at once")
async def revoke(request: Request, key_id: str, _: Admin) -> Response:
    await Parts.of(request).broker.accounts.revoke(key_id)
    return Response(status_code=204)
