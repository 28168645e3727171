"""A job's events as they lie in its stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack
from redis.asyncio import Redis

from . import keys

MOST = 32
"""Events read at once."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One event: "status", "save", "log" or "tokens"; `body` its fields; a save's bytes are `data` or in `blob`."""

    seq: int
    kind: str
    attempt: int
    body: dict[str, Any]
    data: bytes
    blob: str


async def read(redis: Redis, ref: str, after: int, most: int = MOST) -> list[Stored]:
    """A job's next events after number `after`."""
    rows: Any = await redis.xrange(keys.EVENTS.format(ref=ref), f"({after}-0", "+", count=most)
    return [_stored(row_id, row) for row_id, row in rows]


async def one(redis: Redis, ref: str, seq: int) -> Stored | None:
    """A job's event of that number; None if it isn't there."""
    rows: Any = await redis.xrange(keys.EVENTS.format(ref=ref), f"{seq}-0", f"{seq}-0")
    return _stored(*rows[0]) if rows else None


def pushed(message: bytes) -> tuple[str, list[Stored]]:
    """A job's ref, and the events that went along with its wake-up."""
    ref, rows = msgpack.unpackb(message, raw=True)
    return ref.decode(), [
        Stored(seq, kind.decode(), int(attempt), msgpack.unpackb(body, strict_map_key=False), data, blob.decode())
        for seq, kind, attempt, body, data, blob in rows
    ]


def _stored(row_id: bytes, row: dict[bytes, bytes]) -> Stored:
    return Stored(
        seq=int(row_id.split(b"-")[0]),
        kind=row[b"k"].decode(),
        attempt=int(row[b"a"]),
        body=msgpack.unpackb(row[b"m"], strict_map_key=False),
        data=row[b"d"],
        blob=row[b"b"].decode(),
    )
