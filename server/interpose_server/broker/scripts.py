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
    *("announce", "beat", "give_up", "load"),
)


class Scripts:
    """`await scripts(name, *args)`; with a pipeline, the call is queued there."""

    def __init__(self, redis: Redis) -> None:
        folder = files(__package__) / "lua"
        common = f"{prelude()}\n{(folder / 'common.lua').read_text()}"
        self._scripts: dict[str, AsyncScript] = {
            name: redis.register_script(f"{common}\n{(folder / f'{name}.lua').read_text()}") for name in NAMES
        }

    async def __call__(self, name: str, *args: Any, pipe: Pipeline | None = None) -> Any:
        return await self._scripts[name](args=args, client=pipe)
