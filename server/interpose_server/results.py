"""A completed job's saves as one file: safetensors or msgpack, streamed piece by piece."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgpack
from interpose.errors import BadArgument, UnknownJob
from interpose.wire.tensors import SAFETENSORS, decode_spec

from . import blob_keys
from .blobs import Blobs, Reader, read
from .broker import events, keys
from .broker.events import Stored
from .parts import Parts


class Inline:
    """Bytes that came through the broker, read as a blob is."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        part = self._data[offset : offset + buffer.nbytes]
        buffer[: len(part)] = part
        return len(part)

    at_hand = readinto

    async def fetch(self, offset: int, buffer: memoryview) -> int:
        return self.readinto(offset, buffer)

    def close(self) -> None:
        pass


def open_save(blobs: Blobs, user: str, save: Stored) -> Reader:
    """A save's bytes. Raises UnknownJob if they have expired."""
    if not save.blob:
        return Inline(save.data)
    reader = blobs.open(blob_keys.result(user, save.blob))
    if reader is None:
        raise UnknownJob("the job's result has expired; run it again")
    return reader


def _all_there(blobs: Blobs, user: str, saves: Iterable[Stored]) -> None:
    """Blocking. Raises UnknownJob."""
    for save in saves:
        open_save(blobs, user, save).close()


def drop(blobs: Blobs, user: str, names: Iterable[str]) -> None:
    """Delete saves' bytes, by their blobs' names. Blocking."""
    for name in names:
        blobs.delete(blob_keys.result(user, name))


@dataclass(frozen=True, slots=True)
class Results:
    """Args: saves: those of the attempt that completed, in the order they were made."""

    parts: Parts
    user: str
    job: str
    saves: Sequence[Stored]

    @classmethod
    async def of(cls, parts: Parts, user: str, job: str, attempt: int) -> Results:
        """Raises UnknownJob if any bytes are gone."""
        found: list[Stored] = []
        after = 0
        while batch := await events.read(parts.broker.redis, keys.ref(user, job), after):
            found += [event for event in batch if event.kind == "save" and event.attempt == attempt]
            after = batch[-1].seq
        # Those of a result that was acknowledged are gone; once an answer has begun, nothing can tell of it.
        await parts.blobs.run(partial(_all_there, parts.blobs, user, found))
        return cls(parts, user, job, found)

    def safetensors(self) -> tuple[int, AsyncIterator[bytes]]:
        """Size and stream. Tensors are named "<node>.<index>"; the trees are in the metadata, as JSON.

        Raises BadArgument for a dtype the format doesn't have.
        """
        header: dict[str, Any] = {
            "__metadata__": {"trees": json.dumps({save.body["node"]: save.body["tree"] for save in self.saves})}
        }
        at = 0
        for save in self.saves:
            for index, plain in enumerate(save.body["tensors"]):
                spec = decode_spec(plain)
                if spec.dtype not in SAFETENSORS:
                    raise BadArgument(f"safetensors has no {spec.dtype}; ask for format=msgpack")
                header[f"{save.body['node']}.{index}"] = {
                    "dtype": SAFETENSORS[spec.dtype],
                    "shape": list(spec.shape),
                    "data_offsets": [at, at + spec.nbytes],
                }
                at += spec.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return len(head) + at, self._stream([head] + [b""] * len(self.saves))

    def msgpack(self) -> tuple[int, AsyncIterator[bytes]]:
        """Size and stream of {"id", "saves": [{"node", "tree", "tensors", "data"}]}."""
        packer = msgpack.Packer(autoreset=True)
        start = packer.pack_map_header(2) + packer.pack("id") + packer.pack(self.job) + packer.pack("saves")
        heads = [start + packer.pack_array_header(len(self.saves))]
        for save in self.saves:
            head = packer.pack_map_header(4)
            for name in ("node", "tree", "tensors"):
                head += packer.pack(name) + packer.pack(save.body[name])
            # The 32-bit form of a byte string's head, so that its bytes can follow from a file.
            heads.append(head + packer.pack("data") + b"\xc6" + save.body["nbytes"].to_bytes(4, "big"))
        size = sum(map(len, heads)) + sum(save.body["nbytes"] for save in self.saves)
        return size, self._stream(heads)

    async def _stream(self, heads: Sequence[bytes]) -> AsyncIterator[bytes]:
        """heads[0], then heads[k + 1] and the bytes of save k."""
        yield heads[0]
        step = self.parts.settings.chunk_bytes
        for head, save in zip(heads[1:], self.saves, strict=True):
            yield head
            reader = await self.parts.blobs.ask(partial(open_save, self.parts.blobs, self.user, save))
            try:
                at = 0
                while at < reader.size:
                    buffer = bytearray(min(step, reader.size - at))
                    if await read(reader, at, memoryview(buffer)) < len(buffer):
                        raise UnknownJob("the job's result is incomplete")
                    at += len(buffer)
                    yield bytes(buffer)
            finally:
                reader.close()
