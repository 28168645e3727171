"""Jobs on a server: handed in over HTTP, followed over one websocket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace

import httpx

from ..config import CONFIG, Endpoint
from ..errors import MissingAttachment
from ..wire.messages import Ack
from ..wire.protocol import DTYPE_HEADER, INLINE_BYTES, MSGPACK, SHAPE_HEADER
from ..wire.stream import Happening
from ..wire.submission import Submission, encode_submission
from ..wire.tensors import Encoded, shape_text
from .http import Http
from .loop import background
from .socket import Socket

_INLINE_TOTAL = 8 << 20
_UPLOADS = 4


class Remote:
    """The transport to one server with one key. Make it through `remote`, which keeps one a process."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.http = Http(endpoint)
        self._socket = Socket(endpoint, lambda: CONFIG.TIMEOUT)

    async def submit(self, job: Submission, attachments: Mapping[str, Encoded]) -> None:
        self._socket.open()
        inline, apart = _divide(attachments)
        await self._upload(apart, ask=True)
        body = encode_submission(replace(job, attachments={sha: item.data for sha, item in inline.items()}))
        try:
            await self._hand_in(job.id, body)
        except MissingAttachment:
            # The server had one of them and swept it in between.
            await self._upload(attachments, ask=False)
            await self._hand_in(job.id, body)

    async def _hand_in(self, job: str, body: bytes) -> None:
        """Over the open websocket, which is quicker; else, or where that fails, by POST: it is the same job."""
        if not await self._socket.submit(job, body):
            await self._post(body)

    async def _post(self, body: bytes) -> None:
        extra = {"Content-Type": MSGPACK}
        await self.http.request("POST", "/v1/jobs", content=body, extra=extra, patience=CONFIG.CONNECT_TIMEOUT)

    async def _upload(self, attachments: Mapping[str, Encoded], *, ask: bool) -> None:
        """Bring tensors to the server; with `ask`, only those it says it lacks."""
        free = asyncio.Semaphore(_UPLOADS)

        async def bring(sha: str, item: Encoded) -> None:
            path, patience = f"/v1/tensors/{sha}", CONFIG.TIMEOUT
            async with free:
                if ask:
                    # A refusal of HEAD can't say why; the PUT that follows can.
                    answer = await self.http.request("HEAD", path, patience=patience, expected=range(400, 600))
                    if answer.is_success:
                        return
                extra = {
                    DTYPE_HEADER: item.spec.dtype,
                    SHAPE_HEADER: shape_text(item.spec),
                    "Content-Type": "application/octet-stream",
                }
                await self.http.request("PUT", path, content=item.data, extra=extra, patience=patience)

        await asyncio.gather(*(bring(sha, item) for sha, item in attachments.items()))

    def follow(self, job: str) -> AsyncGenerator[Happening, None]:
        return self._socket.follow(job)

    async def cancel(self, job: str) -> None:
        await self.http.request("DELETE", f"/v1/jobs/{job}", patience=CONFIG.CONNECT_TIMEOUT)

    async def release(self, job: str) -> None:
        await self._socket.send(Ack(job))

    async def close(self) -> None:
        await self._socket.close()
        await self.http.close()


def _divide(attachments: Mapping[str, Encoded]) -> tuple[dict[str, Encoded], dict[str, Encoded]]:
    """Those small enough to travel within the job, as many as a job should carry, and the rest."""
    inline: dict[str, Encoded] = {}
    room = _INLINE_TOTAL
    for sha, item in sorted(attachments.items(), key=lambda pair: pair[1].data.nbytes):
        room -= item.data.nbytes
        if item.data.nbytes > INLINE_BYTES or room < 0:
            break
        inline[sha] = item
    return inline, {sha: item for sha, item in attachments.items() if sha not in inline}


def remote(endpoint: Endpoint) -> Remote:
    """This process's transport to a server."""
    own = background()
    found: Remote | None = own.kept.get(endpoint)
    if found is None:
        found = own.run(_make(endpoint))
        found = own.kept.setdefault(endpoint, found)
        own.closers.append(found.close)
    return found


def get(endpoint: Endpoint, path: str, extra: Mapping[str, str] | None = None) -> httpx.Response:
    """One question to a server; waits for the answer. Raises InterposeError."""
    http = remote(endpoint).http
    return background().run(http.request("GET", path, extra=extra, patience=CONFIG.CONNECT_TIMEOUT))


async def _make(endpoint: Endpoint) -> Remote:
    return Remote(endpoint)
