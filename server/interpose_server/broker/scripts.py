"""The Lua steps, each atomic: loaded once, called by digest."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.commands.core import AsyncScript

from .keys import prelude

NAMES = (
    *("submit", "order", "peek", "claim", "release", "heartbeat", "report", "cancel", "reap", "sweep", "ack"),
    *("announce", "beat", "give_up", "load", "retire", "close", "owed", "outdate", "outlived"),
)


def source(name: str, *shared: str) -> str:
    """A script with all that it begins with: what these files share with others."""
    folder = files(__package__) / "lua"
    return "\n".join([prelude(), *((folder / f"{part}.lua").read_text() for part in (*shared, name))])


class Scripts:
    """`await scripts(name, *args)`; with a pipeline, the call is queued there."""

    def __init__(self, redis: Redis) -> None:
        self._scripts: dict[str, AsyncScript] = {
            name: redis.register_script(source(name, "common")) for name in NAMES
        }

    async def __call__(self, name: str, *args: Any, pipe: Pipeline | None = None) -> Any:
        return await self._scripts[name](args=args, client=pipe)
