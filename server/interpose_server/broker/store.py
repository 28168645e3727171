"""The index of blobs whose bytes are in a bucket: which there are, how large, until when.

A bucket can't say how much is in it, replace one object by another for all who look, nor keep an object for who is
reading it. So each blob is written as an object of a new name, which the index then points to; an object nothing
points to any more is deleted later.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from interpose.errors import ConfigError, StorageUnavailable
from redis import BlockingConnectionPool, Redis
from redis.backoff import ExponentialBackoff
from redis.commands.core import Script
from redis.exceptions import RedisError
from redis.retry import Retry

from ..settings import Settings
from . import keys
from .answers import text
from .connect import OPTIONS, UNREADABLE
from .scripts import source

WRITE_MS = 3600_000
"""Who hasn't written an object in this time won't."""
GRACE_MS = 600_000
"""An object lives on for so long after its blob was deleted, for those who are reading it."""
AGAIN_MS = 60_000
"""An object that is to be deleted is named again after so long, unless it was."""
TIDY_S = 3600
"""How often the bucket is compared with the index."""
MOST = 500
"""Of one sweep."""

_NAMES = ("write", "commit", "drop", "keep", "delete", "sweep", "unknown")


@dataclass(frozen=True, slots=True)
class Entry:
    """A blob: its bytes, and the object they are in."""

    size: int
    object: str

    @classmethod
    def parse(cls, raw: bytes) -> Entry:
        size, _, name = raw.decode().split(" ", 2)
        return cls(int(size), name)


@dataclass(frozen=True, slots=True)
class Swept:
    """Args:
    blobs: how many were forgotten.
    freed: their bytes.
    objects: to be deleted now.
    """

    blobs: int
    freed: int
    objects: Sequence[str]


class Store:
    """Blocking, and safe to use from threads. Every method raises StorageUnavailable if Redis doesn't answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._scripts: dict[str, Script] = {
            name: redis.register_script(source(f"store_{name}", "common", "common_store")) for name in _NAMES
        }

    @classmethod
    def at(cls, settings: Settings) -> Store:
        """Over the settings' Redis. Connects when it is first used. Raises ConfigError."""
        try:
            pool = BlockingConnectionPool.from_url(
                settings.redis_url, retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), 10), **OPTIONS
            )
        except ValueError as error:
            raise ConfigError(UNREADABLE) from error
        return cls(Redis.from_pool(pool))

    def id(self) -> str:
        """A random name that this Redis alone has, made the first time."""
        with _mapped():
            self._redis.set(keys.STORE, secrets.token_hex(8), nx=True)
            return text(self._redis.get(keys.STORE))

    def write(self, name: str, charge: int, cap: int) -> bool:
        """An object is about to be written. False if there is no room for it."""
        return bool(self._run("write", name, charge, cap, WRITE_MS))

    def commit(self, name: str, entry: Entry, charge: int, ttl_s: float) -> None:
        """The object was written, and holds the blob of this name from now on."""
        done = self._run("commit", name, entry.object, entry.size, charge, int(ttl_s * 1000), GRACE_MS)
        if not done:
            raise StorageUnavailable("a blob took too long to be stored", details={"retry_after_s": 1})

    def drop(self, name: str) -> None:
        """The object won't be written, or is none anybody will ask for."""
        self._run("drop", GRACE_MS, name)

    def find(self, name: str) -> Entry | None:
        with _mapped():
            raw = self._redis.hget(keys.STORED, name)
        return Entry.parse(raw) if isinstance(raw, bytes) else None

    def keep(self, name: str, ttl_s: float) -> Entry | None:
        """The blob lives for at least so long from now, if there is one."""
        raw = self._run("keep", name, int(ttl_s * 1000))
        return Entry.parse(raw) if raw else None

    def delete(self, name: str, of: str = "") -> None:
        """Forget a blob; if an object is named, only if the blob is in that one."""
        self._run("delete", name, GRACE_MS, of)

    def sweep(self) -> Swept:
        """Forget some of the blobs past their time."""
        blobs, freed, objects = self._run("sweep", GRACE_MS, AGAIN_MS, MOST)
        return Swept(blobs, freed, [name.decode() for name in objects])

    def deleted(self, objects: Sequence[str]) -> None:
        """These are gone from the bucket."""
        with _mapped():
            self._redis.zrem(keys.TRASH, *objects)

    def used(self) -> int:
        """Bytes charged for all blobs, and those being written."""
        with _mapped():
            return int(text(self._redis.get(keys.STORED_BYTES)) or 0)

    def untidy(self) -> bool:
        """Whether the bucket is to be compared with the index now, by whoever asked."""
        with _mapped():
            return bool(self._redis.set(keys.TIDIED, "1", nx=True, ex=TIDY_S))

    def unknown(self, found: Sequence[tuple[str, str]]) -> list[str]:
        """Of (blob's name, object), the objects that nothing knows of."""
        flat = [part for pair in found for part in pair]
        return [name.decode() for name in self._run("unknown", *flat)] if flat else []

    def _run(self, name: str, *args: Any) -> Any:
        with _mapped():
            return self._scripts[name](args=args)


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise StorageUnavailable(
            "the server's index of stored results can't be reached; try again", details={"retry_after_s": 2}
        ) from error
