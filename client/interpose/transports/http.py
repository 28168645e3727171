"""Requests to a server over HTTP: headers, retries, and every failure as an error of ours."""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..config import Endpoint
from ..errors import (
    ConfigError,
    ConnectionFailed,
    InterposeError,
    InvalidPayload,
    NotFound,
    VersionMismatch,
    from_wire,
)
from ..wire.fields import unpack
from ..wire.messages import Loading
from ..wire.protocol import HEADER, MSGPACK, PROBLEM, PROTOCOL, TAKES_HEADER

_PIECE = 1 << 20
_ENCODED = ("content-encoding", "content-length", "transfer-encoding")

MAX_ANSWER = 256 << 20
"""Bytes of one answer, unpacked: manifests and tokenizers are the largest. Results come over the stream."""

_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")
"""OpenSSL's names for an answer that isn't TLS."""

_TIMEOUTS = httpx.Timeout(connect=5.0, read=120.0, write=120.0, pool=120.0)


def headers(endpoint: Endpoint) -> dict[str, str]:
    """What every request carries."""
    own = {HEADER: str(PROTOCOL), TAKES_HEADER: Loading.type}
    if endpoint.key:
        own["Authorization"] = f"Bearer {endpoint.key}"
    return own


def delays() -> Iterator[float]:
    """Seconds to wait before each next try: doubling from 50 ms to 5 s, spread lest clients march in step."""
    delay = 0.05
    while True:
        yield delay * random.uniform(0.5, 1.5)
        delay = min(delay * 2, 5.0)


def trusted() -> ssl.SSLContext:
    """Whose certificates are believed, of any server: those SSL_CERT_FILE or SSL_CERT_DIR names, else certifi's."""
    return _context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@cache
def _context(*variables: str | None) -> ssl.SSLContext:
    """Made once for what the environment says: it takes long."""
    return httpx.create_ssl_context()


class Http:
    """One connection pool to one server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        secure = endpoint.url.startswith("https:")
        self._client = httpx.AsyncClient(
            headers=headers(endpoint),
            timeout=_TIMEOUTS,
            # Proxies of the environment aren't for this machine.
            trust_env=not endpoint.local,
            verify=trusted() if secure else False,
        )

    async def request(
        self,
        method: str,
        path: str,
        *,
        content: bytes | memoryview | None = None,
        extra: Mapping[str, str] | None = None,
        patience: float,
        expected: Collection[int] = (),
    ) -> httpx.Response:
        """An answer below 400, or of a status that is `expected`. Lost connections are tried again.

        Args:
            content: the body; asked for again on each try.
            patience: seconds for which to try.

        Raises:
            InterposeError: the one the server described.
            ConnectionFailed: nothing answered in time, or what did is no Interpose server.
        """
        deadline = asyncio.get_running_loop().time() + patience
        for delay in delays():
            try:
                return self._checked(await self._once(method, path, content, extra), expected)
            except ConnectionFailed:
                if asyncio.get_running_loop().time() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)
        raise AssertionError("delays never end")

    async def _once(
        self, method: str, path: str, content: bytes | memoryview | None, extra: Mapping[str, str] | None
    ) -> httpx.Response:
        sent = dict(extra or {})
        body: bytes | AsyncIterator[bytes] | None = None
        if isinstance(content, memoryview):
            sent["Content-Length"] = str(content.nbytes)
            body = _pieces(content)
        elif content is not None:
            body = content
        try:
            request = self._client.build_request(method, self.endpoint.url + path, content=body, headers=sent)
            return await _read(await self._client.send(request, stream=True))
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # What the libraries below say is in the message; pages of their frames, which stay in the context, add
            # nothing.
            raise unreachable(self.endpoint, error) from None

    def _checked(self, answer: httpx.Response, expected: Collection[int]) -> httpx.Response:
        # An answer to HEAD has a problem's type but no body: what is expected isn't read.
        if answer.status_code not in expected and answer.headers.get("content-type", "").startswith(PROBLEM):
            raise self._told(problem(answer.content, answer.headers))
        check_protocol(self.endpoint, answer.headers.get(HEADER), answer.status_code)
        if answer.has_redirect_location and answer.status_code not in expected:
            raise ConfigError(f"{self.endpoint.url} sends its clients elsewhere; set INTERPOSE_HOST to where it is")
        if answer.status_code >= 400 and answer.status_code not in expected:
            raise ConnectionFailed(f"{self.endpoint.url} answered {answer.status_code} without saying why")
        return answer

    def _told(self, error: InterposeError) -> InterposeError:
        """An address with a path that the server doesn't have is a mistake in the address."""
        path = urlsplit(self.endpoint.url).path
        if path and isinstance(error, NotFound):
            bare = self.endpoint.url.removesuffix(path)
            return ConfigError(f"{bare} has nothing at {path}; set INTERPOSE_HOST to {bare}")
        return error

    async def close(self) -> None:
        await self._client.aclose()


async def _read(answer: httpx.Response) -> httpx.Response:
    """The answer with its body. Raises InvalidPayload at the first byte of more than any server has to say."""
    body = bytearray()
    try:
        async for part in answer.aiter_bytes():
            body += part
            if len(body) > MAX_ANSWER:
                raise InvalidPayload(f"the server's answer doesn't end; {MAX_ANSWER:,} bytes are taken")
    finally:
        await answer.aclose()
    # What was decoded on the way isn't to be decoded again.
    own = [(name, value) for name, value in answer.headers.multi_items() if name not in _ENCODED]
    return httpx.Response(answer.status_code, headers=own, content=bytes(body), request=answer.request)


async def _pieces(view: memoryview) -> AsyncIterator[bytes]:
    for start in range(0, view.nbytes, _PIECE):
        yield bytes(view[start : start + _PIECE])


def problem(body: bytes | bytearray | None, answered: Mapping[str, str]) -> InterposeError:
    """The error a problem+json body describes."""
    try:
        plain = json.loads(body or b"")
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict) or "code" not in plain:
        return ConnectionFailed("the server refused, and its reason can't be read")
    error = from_wire(plain)
    wait = answered.get("retry-after", "")
    if wait.isdecimal() and len(wait) < 10:
        error.details.setdefault("retry_after_s", int(wait))
    return error


def check_protocol(endpoint: Endpoint, stated: str | None, status: int) -> None:
    """Look at who answered.

    Raises:
        VersionMismatch: a server of another protocol.
        ConnectionFailed: a proxy whose server is away.
        ConfigError: something else altogether.
    """
    if stated is None and status >= 500:
        raise ConnectionFailed(f"{endpoint.url} answers {status}: its Interpose server is away")
    if stated is None:
        perhaps = "; or is it https?" if status == 400 and endpoint.url.startswith("http:") else ""
        raise ConfigError(
            f"what answers at {endpoint.url} isn't an Interpose server; check INTERPOSE_HOST{perhaps}"
        )
    if stated != str(PROTOCOL):
        raise VersionMismatch(
            f"the server speaks protocol {stated[:16]}, this client {PROTOCOL}; upgrade the older of the two",
            details={"client": PROTOCOL, "server": stated[:16]},
        )


def unreachable(endpoint: Endpoint, error: BaseException) -> InterposeError:
    """What a failed connection means: a ConfigError where trying again is of no use."""
    reason = str(error) or type(error).__name__
    if endpoint.url.startswith("https:") and any(mark in reason for mark in _NO_TLS):
        plain = "http" + endpoint.url.removeprefix("https")
        return ConfigError(f"what answers at {endpoint.url} speaks plain HTTP; set INTERPOSE_HOST to {plain}")
    return ConnectionFailed(
        f"can't reach {endpoint.url}: {reason}; is the server running, and INTERPOSE_HOST right?"
    )


def body_of(answer: httpx.Response) -> Any:
    """The decoded body, JSON or msgpack. Raises InvalidPayload."""
    if answer.headers.get("content-type", "").startswith(MSGPACK):
        return unpack(answer.content, longest=1 << 20, containers=1 << 22)
    try:
        return answer.json()
    except ValueError as error:
        raise InvalidPayload(f"the server's answer isn't JSON: {error}") from error
