"""The broker as one object: queue, accounts, models and their catalogue over one Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interpose.errors import ConfigError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..settings import Settings
from .accounts import Accounts
from .models import Models
from .queue import Queue
from .scripts import Scripts
from .specs import Specs

OPTIONS: dict[str, Any] = {
    # One loop makes no use of more at once. Whoever comes then waits for one: the plain pool would refuse them, and
    # opening a connection takes longer than most commands.
    "max_connections": 32,
    "timeout": 30,
    "retry_on_error": [RedisConnectionError, RedisTimeoutError],
    "health_check_interval": 0,
    "socket_timeout": 30,
}
"""Of a pool of connections to Redis."""


@dataclass(frozen=True, slots=True)
class Broker:
    redis: Redis
    queue: Queue
    accounts: Accounts
    models: Models
    specs: Specs

    async def reach(self) -> None:
        """Raises ConfigError if Redis doesn't answer, or not to us."""
        try:
            await self.redis.ping()
        except (RedisError, OSError) as error:
            raise ConfigError(f"Redis can't be used: {error}") from error

    async def close(self) -> None:
        await self.redis.aclose()


UNREADABLE = (
    "the Redis URL can't be read: it is redis://[[USER]:PASSWORD@]HOST[:PORT][/NUMBER], the same with rediss:// "
    "for TLS, or unix://PATH; special characters of a password are written as %XX"
)
"""Without what was said: it may hold a password."""


def connect(settings: Settings) -> Broker:
    """A broker that connects when it is first used, and rides out a restart of Redis. Raises ConfigError."""
    try:
        pool = BlockingConnectionPool.from_url(
            settings.redis_url,
            # Every call may be made twice: scripts are idempotent where it matters. About three seconds in all.
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), 10),
            **OPTIONS,
        )
    except ValueError as error:
        raise ConfigError(UNREADABLE) from error
    redis = Redis.from_pool(pool)
    scripts = Scripts(redis)
    return Broker(
        redis=redis,
        queue=Queue(redis, scripts, settings),
        accounts=Accounts(redis),
        models=Models(redis, scripts, settings),
        specs=Specs(redis, scripts, settings),
    )
