"""Who is asking: the bearer key of a request or a websocket."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from interpose.errors import Forbidden, Unauthorized
from starlette.requests import HTTPConnection

from .broker.accounts import PREFIX, Key
from .parts import Parts


async def identify(connection: HTTPConnection) -> Key:
    """The key a connection shows, within its user's rate. Raises Unauthorized, QueueFull."""
    parts = Parts.of(connection)
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized("no API key; set INTERPOSE_API_KEY or CONFIG.API_KEY")
    key = await parts.broker.accounts.find(token.strip()) if token.startswith(PREFIX) and len(token) < 128 else None
    if key is None:
        raise Unauthorized("the API key is unknown or revoked; ask whoever runs the server for one")
    parts.rate.take(key.user)
    return key


async def _request(request: Request) -> Key:
    return await identify(request)


User = Annotated[Key, Depends(_request)]
"""The caller's key, as a route's parameter."""


async def _admin(key: User) -> Key:
    if not key.admin:
        raise Forbidden("this needs an admin's key")
    return key


Admin = Annotated[Key, Depends(_admin)]


def allow(key: Key, model: str) -> None:
    """Raises Forbidden. Asked before whether the model exists, so that the answer doesn't tell."""
    if not key.allows(model):
        raise Forbidden(f"this key isn't for {model!r}; it may use {', '.join(key.models)}")
