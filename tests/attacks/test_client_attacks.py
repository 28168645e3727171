"""An honest client of a malicious server."""

from __future__ import annotations

import gzip
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from interpose import catalog
from interpose.config import Endpoint
from interpose.errors import ConfigError, InterposeError, InvalidPayload, LimitExceeded
from interpose.graph.values import TensorSpec
from interpose.transports import http
from interpose.wire.messages import Chunk, Save
from interpose.wire.stream import JobStream

JOB = "0" * 32
HONEST, EVIL = Endpoint("http://lab:1", "k"), Endpoint("http://evil:1", "k")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(catalog, "cache_folder", lambda: tmp_path)
    yield


async def _endless() -> AsyncIterator[bytes]:
    while True:
        yield bytes(1 << 16)


@pytest.mark.parametrize("bomb", [False, True])
async def test_an_answer_without_end_is_cut(bomb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_ANSWER", 1 << 20)
    packed = gzip.compress(bytes(8 << 20))

    def answer(_: httpx.Request) -> httpx.Response:
        own = {"interpose-protocol": "1"}
        if bomb:
            return httpx.Response(200, headers=own | {"content-encoding": "gzip"}, content=packed)
        return httpx.Response(200, headers=own, content=_endless())

    client = http.Http(EVIL)
    client._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    with pytest.raises(InvalidPayload):
        await client.request("GET", "/v1/models", patience=1)
    await client.close()


async def test_no_redirect_is_followed_or_taken_for_an_answer() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(307, headers={"interpose-protocol": "1", "location": "http://elsewhere/"})

    client = http.Http(EVIL)
    client._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    with pytest.raises(ConfigError):
        await client.request("POST", "/v1/jobs", content=b"x", patience=1)
    await client.close()
    assert asked == ["evil"]


def test_memory_is_taken_as_bytes_come_and_not_as_they_are_announced() -> None:
    stream = JobStream(JOB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = TensorSpec((1 << 33,), "uint8")
    stream.feed(Save(JOB, 1, 0, 1, {"tensor": 0}, (huge,)))
    try:
        stream.feed(Chunk(JOB, 1, 0, memoryview(b"x")))
    except LimitExceeded:
        return
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


def test_one_servers_manifest_never_stands_for_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    tag = "a" * 64
    catalog._store(catalog._head(HONEST, "m"), tag.encode())
    catalog._store(catalog._body(HONEST, tag), b"honest")
    catalog._store(catalog._head(EVIL, "m"), tag.encode())
    catalog._store(catalog._body(EVIL, tag), b"evil")
    seen: list[bytes] = []

    def decode(body: bytes) -> object:
        seen.append(body)
        raise InvalidPayload("seen")

    monkeypatch.setattr(catalog, "_decode", decode)
    for server in (HONEST, EVIL):
        assert catalog._stored(server, "m") is None
    assert seen == [b"honest", b"evil"]


def test_errors_of_any_form_are_errors() -> None:
    for body in (b"[]", b"{}", b'{"code": [], "message": {}}', b'{"code": "__class__", "details": 1}', b"\xff"):
        assert isinstance(http.problem(body, {"retry-after": "9" * 30}), InterposeError)
