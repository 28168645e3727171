"""What workers publish of their models, and whether they are alive."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgpack
from interpose.errors import UnknownModel
from interpose.graph.manifest import Manifest, encode_manifest, fingerprint
from redis.asyncio import Redis

from . import keys
from .answers import text


class ModelState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"
    """No worker has been heard of for a while."""


@dataclass(frozen=True, slots=True)
class Hosted:
    """One model. `fingerprint` is empty until a worker has loaded it for the first time.

    batches, jobs: how many were run so far; a batch is one or more jobs that were given to the engine together.
    busy_s: how long the engine has worked on them.
    budget: what a batch may hold, and the measurements that says it, for people.
    """

    name: str
    state: ModelState
    worker: str
    fingerprint: str
    revision: str
    tokenizer: str
    seen_ms: int
    batches: int
    jobs: int
    busy_s: float = 0.0
    budget: Mapping[str, Any] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "state": str(self.state),
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "budget": dict(self.budget),
        }


class Models:
    """Args: silent_s: a model whose workers were silent for so long counts as stopped."""

    def __init__(self, redis: Redis, silent_s: float) -> None:
        self._redis = redis
        self._silent_ms = silent_s * 1000

    async def announce(self, name: str, worker: str, state: ModelState) -> None:
        """A worker says what it is doing. Ready counts only after `publish`."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.sadd(keys.MODELS, keys.check_model(name))
            pipe.hset(_key(name), mapping={"state": str(state), "worker": worker, "seen_ms": _now()})
            await pipe.execute()

    async def publish(
        self, name: str, worker: str, manifest: Manifest, tokenizer: str, budget: Mapping[str, Any] | None = None
    ) -> None:
        """Make a loaded model known, ready for jobs.

        Args:
            tokenizer: name of the blob with its tokenizer file, "" without one.
            budget: what its batches may hold, for people. Not of the manifest: it differs from load to load.
        """
        mark = fingerprint(manifest)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(
                _key(name),
                mapping={
                    "manifest": msgpack.packb(encode_manifest(manifest)),
                    "fingerprint": mark,
                    "revision": manifest.revision,
                    "tokenizer": tokenizer,
                    "budget": msgpack.packb(dict(budget or {})),
                },
            )
            await pipe.execute()
        await self.announce(name, worker, ModelState.READY)

    async def beat(self, name: str, batches: int = 0, jobs: int = 0, busy_s: float = 0.0) -> None:
        """A worker is alive, and has run so many more batches and jobs, for so long, since it last said so."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(_key(name), "seen_ms", _now())
            pipe.hincrby(_key(name), "batches", batches)
            pipe.hincrby(_key(name), "jobs", jobs)
            pipe.hincrbyfloat(_key(name), "busy_s", busy_s)
            await pipe.execute()

    async def get(self, name: str) -> Hosted:
        """Raises UnknownModel."""
        names = ["state", "worker", "fingerprint", "revision", "tokenizer", "seen_ms", "batches", "jobs", "busy_s"]
        *found, budget = await self._redis.hmget(_key(name), [*names, "budget"])
        state, worker, mark, revision, tokenizer, seen, batches, jobs, busy = map(text, found)
        if not state:
            raise await self._unknown(name)
        seen_ms = int(seen or 0)
        silent = _now() - seen_ms > self._silent_ms and state != ModelState.FAILED
        return Hosted(
            name=name,
            state=ModelState.STOPPED if silent else ModelState(state),
            worker=worker,
            fingerprint=mark,
            revision=revision,
            tokenizer=tokenizer,
            seen_ms=seen_ms,
            batches=int(batches or 0),
            jobs=int(jobs or 0),
            busy_s=float(busy or 0),
            budget=msgpack.unpackb(budget) if budget else {},
        )

    async def manifest(self, name: str) -> bytes:
        """The manifest's msgpack. Raises UnknownModel."""
        raw = await self._redis.hget(_key(name), "manifest")
        if raw is None:
            raise await self._unknown(name)
        assert isinstance(raw, bytes)
        return raw

    async def list(self) -> list[Hosted]:
        names = sorted(map(text, await self._redis.smembers(keys.MODELS)))
        return [await self.get(name) for name in names]

    async def forget(self, name: str) -> None:
        """Stop listing a model that is no longer served here."""
        await self._redis.srem(keys.MODELS, name)
        await self._redis.delete(_key(name))

    async def _unknown(self, name: str) -> UnknownModel:
        names = sorted(map(text, await self._redis.smembers(keys.MODELS)))
        return UnknownModel(f"no model {name!r} is served here; there is {', '.join(names) or 'none yet'}")


def _key(name: str) -> str:
    return keys.MODEL.format(model=name)


def _now() -> int:
    return time.time_ns() // 1_000_000
