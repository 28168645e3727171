"""Every error as application/problem+json, with its code and nothing of the server's inside."""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from interpose.errors import InternalError, InterposeError, InvalidPayload, NotFound, RequestError
from interpose.wire.protocol import HEADER, PROBLEM, PROTOCOL
from pydantic import BaseModel
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .mistakes import mistakes, words

log = logging.getLogger(__name__)


def problem(error: InterposeError, status: int | None = None) -> Response:
    """The response for an error; `status` where it isn't the error's own."""
    status = status or error.status
    body = {
        "type": f"urn:interpose:error:{error.code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": error.message,
        **error.to_wire(),
    }
    headers = {HEADER: str(PROTOCOL)}
    wait = error.details.get("retry_after_s")
    if isinstance(wait, (int, float)):
        headers["Retry-After"] = str(math.ceil(wait))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(body), status, headers, PROBLEM)


async def _known(_: Request, error: Exception) -> Response:
    assert isinstance(error, InterposeError)
    return problem(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return problem(NotFound(f"there is nothing at {request.url.path[:200]}"))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response = problem(RequestError(f"{request.method} isn't possible here"), error.status_code)
        response.headers.update(error.headers or {})
        return response
    return problem(RequestError(HTTPStatus(error.status_code).phrase), error.status_code)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0] if error.errors() else {"loc": ()}
    if first.get("type", "json_invalid") == "json_invalid":
        return problem(InvalidPayload("the body is no JSON"))
    if (kind := _body_of(request)) is not None and first["loc"][:1] == ("body",):
        first = {**first, "loc": first["loc"][1:]}
        return problem(InvalidPayload(str(mistakes([first], kind)[0])))
    where = ".".join(map(str, first["loc"]))
    return problem(InvalidPayload(f"{where}: {words(first)}"))


def _body_of(request: Request) -> type[BaseModel] | None:
    """What a request's body is to be, where it is one model."""
    field = getattr(request.scope.get("route"), "body_field", None)
    kind = getattr(getattr(field, "field_info", None), "annotation", None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


async def _broker(_: Request, error: Exception) -> Response:
    log.error("the broker failed: %s", type(error).__name__)
    return problem(
        InternalError("the server's queue can't be reached; try again", details={"retry_after_s": 1}), 503
    )


async def _unknown(_: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return problem(InternalError("the server failed on this request; its log says why"))


def install(app: FastAPI) -> None:
    """Make every way out of the app a problem."""
    app.add_exception_handler(InterposeError, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(RedisError, _broker)
    app.add_exception_handler(Exception, _unknown)
