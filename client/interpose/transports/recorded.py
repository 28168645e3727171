"""Conversations on file: recorded through any transport, replayed without one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgpack

from ..errors import InvalidPayload, NotFound, UnknownJob
from ..graph.codec import encode_graph
from ..wire.fields import Fields, unpack
from ..wire.messages import Log, Position, Save, Status, chunks, decode_server, encode
from ..wire.result import Saved
from ..wire.stream import Changed, Happening, JobStream, Logged, Moved
from ..wire.submission import Submission
from ..wire.tensors import Encoded
from .base import Transport

_FORMAT = 1


class Recorder:
    """Passes everything on to another transport, and keeps what each job was and what happened to it.

    `save` writes the file. Errors of the transport itself are not kept.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self._asked: dict[str, str] = {}
        self._told: dict[str, list[bytes]] = {}

    async def submit(self, job: Submission, attachments: Mapping[str, Encoded]) -> None:
        await self.inner.submit(job, attachments)
        self._asked[job.id] = key(job)

    async def follow(self, job: str) -> AsyncGenerator[Happening, None]:
        frames: list[bytes] = []
        seq = attempt = 0
        async with aclosing(self.inner.follow(job)) as events:
            async for event in events:
                seq += isinstance(event, (Changed, Saved, Logged))
                attempt = event.attempt if isinstance(event, Changed) else attempt
                frames += _frames(job, seq, event, attempt)
                yield event
        self._told[job] = frames

    async def cancel(self, job: str) -> None:
        await self.inner.cancel(job)

    async def release(self, job: str) -> None:
        await self.inner.release(job)

    async def close(self) -> None:
        await self.inner.close()

    def save(self, path: Path) -> None:
        """Write all conversations that came to their end."""
        talks = [
            {"job": job, "key": self._asked[job], "frames": frames}
            for job, frames in self._told.items()
            if job in self._asked
        ]
        path.write_bytes(msgpack.packb({"format": _FORMAT, "talks": talks}))


class Recorded:
    """Answers each job as the recorded one with the same model, graph and options was answered, in that order.

    Raises:
        InvalidPayload: the file isn't a recording.
    """

    def __init__(self, path: Path) -> None:
        fields = Fields(unpack(path.read_bytes(), longest=1 << 20, containers=1 << 20), "a recording")
        if fields.whole("format") != _FORMAT:
            raise InvalidPayload(f"{path} is a recording of another version")
        self._talks: dict[str, list[tuple[str, list[Any]]]] = {}
        for plain in fields.list("talks", 1 << 20):
            talk = Fields(plain, "a recorded job")
            told = talk.job(), talk.list("frames", 1 << 20)
            self._talks.setdefault(talk.text("key"), []).append(told)
        self._jobs: dict[str, tuple[str, list[Any]]] = {}

    async def submit(self, job: Submission, attachments: Mapping[str, Encoded]) -> None:
        if job.id in self._jobs:
            return
        talks = self._talks.get(key(job))
        if not talks:
            raise NotFound(
                "no such job is left in the recording: its model, graph or options differ; record it anew"
            )
        self._jobs[job.id] = talks.pop(0)

    async def follow(self, job: str) -> AsyncGenerator[Happening, None]:
        if job not in self._jobs:
            raise UnknownJob(f"job {job} was never submitted here")
        recorded, frames = self._jobs[job]
        stream = JobStream(recorded)
        for frame in frames:
            for event in stream.feed(decode_server(frame)):
                yield event

    async def cancel(self, job: str) -> None:
        """What was recorded has happened already."""

    async def release(self, job: str) -> None: ...

    async def close(self) -> None: ...


def key(job: Submission) -> str:
    """Equal for jobs that ask the same: neither their ids nor the lines they were written on count."""
    plain = encode_graph(job.graph)
    plain.pop("files")
    for node in plain["nodes"]:
        node.pop("source", None)
    asked = [job.model, plain, job.batching, job.timeout_s]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _frames(job: str, seq: int, event: Happening, attempt: int) -> list[bytes]:
    """The event as the frames a server would have sent."""
    match event:
        case Changed():
            return [encode(Status(job, seq, event.attempt, event.status, event.error))]
        case Logged():
            return [encode(Log(job, seq, attempt, event.node, event.text))]
        case Moved():
            return [encode(Position(job, event.position))]
        case Saved():
            head = encode(Save(job, seq, attempt, event.node, event.tree, event.specs))
            return [head, *chunks(job, seq, event.parts)]
    return []
