"""The outermost layer: both sides state their protocol; requests are counted and timed."""

from __future__ import annotations

import time
from typing import Any

from interpose.errors import VersionMismatch
from interpose.wire.protocol import HEADER, PROTOCOL
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .problems import problem

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})


class Handshake:
    """Refuses under /v1 a client of another protocol; one that states none is taken at its word (curl does so)."""

    def __init__(self, app: ASGIApp, protocols: tuple[int, ...], metrics: Metrics) -> None:
        self._app = app
        self._protocols = protocols
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        stated = HTTPConnection(scope).headers.get(HEADER)
        if stated is not None and scope["path"].startswith("/v1/") and not self._speaks(stated):
            response = problem(
                VersionMismatch(
                    f"the client speaks protocol {stated[:20]}, the server "
                    f"{' and '.join(map(str, self._protocols))}; upgrade the older of the two",
                    details={"server": list(self._protocols)},
                )
            )
            await response(scope, receive, send)
            return
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _speaks(self, stated: str) -> bool:
        return stated in map(str, self._protocols)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = str(PROTOCOL)
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            # The route's pattern, never the path: paths hold job ids.
            route: Any = scope.get("route")
            name = getattr(route, "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, name, status).inc()
            self._metrics.seconds.labels(name).observe(time.perf_counter() - start)
