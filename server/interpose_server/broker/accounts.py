"""API keys: shown once, kept as SHA-256 of 256 random bits, gone the moment they are revoked."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import asdict, dataclass

from interpose.errors import NotFound
from redis.asyncio import Redis

from . import keys

PREFIX = "ip_"


@dataclass(frozen=True, slots=True)
class Key:
    """Attributes:
    id: names the key to people; no secret.
    models: what it may use; empty for all.
    """

    id: str
    user: str
    admin: bool
    models: tuple[str, ...]
    created_ms: int
    digest: str

    def allows(self, model: str) -> bool:
        return not self.models or model in self.models

    def to_plain(self) -> dict[str, object]:
        """For people: without the digest."""
        plain = asdict(self)
        del plain["digest"]
        return {**plain, "models": list(self.models)}


class Accounts:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def create(self, user: str, *, admin: bool = False, models: tuple[str, ...] = ()) -> tuple[str, Key]:
        """A new key. Returns its token, which is stored nowhere, and its record."""
        keys.check_user(user)
        token = PREFIX + secrets.token_urlsafe(32)
        key = Key(
            id=secrets.token_hex(4),
            user=user,
            admin=admin,
            models=tuple(keys.check_model(model) for model in models),
            created_ms=time.time_ns() // 1_000_000,
            digest=_digest(token),
        )
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.KEYS, key.digest, json.dumps(asdict(key)))
            pipe.hset(keys.KEY_IDS, key.id, key.digest)
            await pipe.execute()
        return token, key

    async def find(self, token: str) -> Key | None:
        """The key of a token, or None."""
        digest = _digest(token)
        raw = await self._redis.hget(keys.KEYS, digest)
        if raw is None:
            return None
        key = _key(raw)
        return key if hmac.compare_digest(key.digest, digest) else None

    async def list(self) -> list[Key]:
        """All keys, oldest first."""
        found = [_key(raw) for raw in (await self._redis.hgetall(keys.KEYS)).values()]
        return sorted(found, key=lambda key: (key.created_ms, key.id))

    async def any(self) -> bool:
        return bool(await self._redis.hlen(keys.KEYS))

    async def revoke(self, key_id: str) -> None:
        """Forget a key and cut its open streams. Raises NotFound."""
        digest = await self._redis.hget(keys.KEY_IDS, key_id)
        if digest is None:
            raise NotFound(f"there is no key {key_id!r}; `interpose keys list` shows them")
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hdel(keys.KEYS, digest)
            pipe.hdel(keys.KEY_IDS, key_id)
            pipe.publish(keys.WAKE, f"!{key_id}")
            await pipe.execute()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _key(raw: bytes | str) -> Key:
    plain = json.loads(raw)
    return Key(**{**plain, "models": tuple(plain["models"])})
