"""What a key's owner may do, and has done."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..auth import User
from ..parts import Parts

router = APIRouter(prefix="/v1/me", tags=["account"])


@router.get("", summary="Your limits and usage")
async def me(request: Request, user: User) -> dict[str, Any]:
    parts = Parts.of(request)
    settings = parts.settings
    return {
        "user": user.user,
        "key": user.id,
        "admin": user.admin,
        "models": list(user.models),
        "limits": {
            **settings.limits.as_dict(),
            "queued": settings.queued_per_user,
            "running": settings.running_per_user,
            "rate_per_s": settings.rate_per_s,
            "result_ttl_s": settings.result_ttl_s,
        },
        "queue": await parts.broker.queue.load(user.user),
        "usage": await parts.broker.queue.usage(user.user),
    }
