"""The catalogue: the models an operator allows here, and what was asked of them by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from interpose.errors import ConfigError, ModelUnavailable, UnknownModel
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from ..models.inventory import Inventory
from ..models.spec import ModelSpec
from ..settings import Settings
from . import keys
from .answers import text
from .scripts import Scripts

KEPT_S = 30
"""Who keeps models as the catalogue says was heard of within so long."""

BY_HAND_S = 3600.0
"""So long somebody's request to load a model stands while there is no room for it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """`removed`: it takes no more jobs, and is dropped from the catalogue once those it has are over."""

    spec: ModelSpec
    removed: bool = False


class Specs:
    """Each change is counted in `revision`, so that who keeps models need not read what hasn't changed."""

    def __init__(self, redis: Redis, scripts: Scripts, settings: Settings) -> None:
        self._redis = redis
        self._run = scripts
        self._settings = settings

    async def entries(self) -> list[Entry]:
        """All, by name; those that were removed until their jobs are over.

        Raises:
            ConfigError: this version can't read one. Left out, it would be taken for removed: so nothing is
                followed until an operator puts it again or removes it.
        """
        found = await self._redis.hgetall(keys.SPECS)
        return [_entry(text(name), raw) for name, raw in sorted(found.items())]

    async def list(self) -> list[ModelSpec]:
        """What is in the catalogue."""
        return [entry.spec for entry in await self.entries() if not entry.removed]

    async def removed(self) -> Sequence[str]:
        """Names of those that are to go, whatever version wrote the others."""
        found = await self._redis.hgetall(keys.SPECS)
        return [text(name) for name, raw in sorted(found.items()) if json.loads(raw)["removed"]]

    async def find(self, name: str) -> Entry | None:
        """Raises ConfigError if this version can't read it."""
        raw = await self._redis.hget(keys.SPECS, name)
        return None if raw is None else _entry(name, raw)

    async def get(self, name: str) -> ModelSpec:
        """Raises UnknownModel."""
        entry = await self.find(name)
        if entry is None or entry.removed:
            names = ", ".join(spec.name for spec in await self.list())
            hint = "what `interpose serve` serves is named on its command line"
            raise UnknownModel(f"no model {name!r} is in the catalogue; there is {names or f'none ({hint})'}")
        return entry.spec

    async def revision(self) -> int:
        """A number that changes whenever an entry does."""
        return int(await self._redis.get(keys.SPECS_CHANGED) or 0)

    async def put(self, spec: ModelSpec) -> bool:
        """Add a model, or replace what is said of it; loading that failed may be tried again. Whether it is new.

        Raises:
            ConfigError: its settings aren't settings, its dtype is none, or its resources none that Ray takes.
        """
        for wrong in spec.wrong():
            raise ConfigError(str(wrong))
        self._settings.changed(spec.settings)
        raw = await self._redis.hget(keys.SPECS, spec.name)
        before = None if raw is None else _read(raw)
        await self._write(Entry(spec))
        await self._redis.hdel(_key(spec.name), "failure", "evict")
        if raw is not None and (before is None or before.spec.weights != spec.weights):
            await self._run("outdate", spec.name, self._settings.silent_ms)
        return raw is None

    async def remove(self, name: str) -> None:
        """Take no more jobs for a model. It goes once those it has are over. Raises UnknownModel."""
        raw = await self._redis.hget(keys.SPECS, name)
        if raw is not None and _read(raw) is None:
            await self._write(Entry(ModelSpec(name=name), removed=True))
        else:
            await self._change(name, lambda spec: Entry(spec, removed=True))

    async def pin(self, name: str, pinned: bool) -> None:
        """Whether a model that is loaded stays so. Raises UnknownModel."""
        await self._change(name, lambda spec: Entry(spec.model_copy(update={"pinned": pinned})))

    @staticmethod
    def gone(name: str) -> ModelUnavailable:
        """What those are told who wait for a model that is removed at once."""
        return ModelUnavailable(
            f"{name} was taken out of service before your job ran", details={"state": "stopped"}
        )

    async def load(self, name: str) -> None:
        """Have a model loaded, also if that failed before. Raises UnknownModel."""
        await self.get(name)
        await self._redis.hdel(_key(name), "failure", "evict")
        await self._wish(name, BY_HAND_S)

    async def wish(self, name: str) -> None:
        """Somebody wants to use a model of the catalogue."""
        await self._wish(name, self._settings.wish_s)

    async def fulfilled(self, name: str) -> None:
        """What was wished for is there: gone again later, it doesn't come back for that."""
        await self._redis.hdel(_key(name), "wish_ms")

    async def evict(self, name: str) -> None:
        """Let a model go as soon as it has no work.

        Raises:
            UnknownModel: it isn't in the catalogue.
            ConfigError: it is to stay loaded.
        """
        spec = await self.get(name)
        if spec.pinned:
            raise ConfigError(f"{name} is pinned; unpin it first")
        if spec.replicas.min:
            raise ConfigError(
                f"{name} stays loaded, as its replicas.min is {spec.replicas.min}; set that to 0 first"
            )
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(_key(name), "evict", "1")
            pipe.hdel(_key(name), "wish_ms")
            await pipe.execute()

    async def keep(self) -> None:
        """Say that somebody brings models up and down as the catalogue says."""
        await self._redis.set(keys.KEEPER, "1", ex=KEPT_S)

    async def kept(self) -> bool:
        return bool(await self._redis.exists(keys.KEEPER))

    async def show(self, inventory: Inventory) -> None:
        """Tell operators what devices there are."""
        await self._redis.set(keys.INVENTORY, json.dumps(inventory.to_plain()), ex=KEPT_S)

    async def shown(self) -> Inventory | None:
        """What devices there are; None where nobody has said so lately."""
        raw = await self._redis.get(keys.INVENTORY)
        return None if raw is None else Inventory.from_plain(json.loads(raw))

    async def _wish(self, name: str, for_s: float) -> None:
        seconds, micros = await self._redis.time()
        until = max(
            seconds * 1000 + micros // 1000 + int(for_s * 1000),
            int(await self._redis.hget(_key(name), "wish_ms") or 0),
        )
        await self._redis.hset(_key(name), "wish_ms", until)

    async def _write(self, entry: Entry) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            _queue(pipe, entry)
            await pipe.execute()

    async def _change(self, name: str, change: Callable[[ModelSpec], Entry]) -> None:
        """Make another entry of the one there is, whoever else is changing it. Raises UnknownModel."""
        async with self._redis.pipeline(transaction=True) as pipe:
            while True:
                await pipe.watch(keys.SPECS)
                entry = change(await self.get(name))
                pipe.multi()  # type: ignore[no-untyped-call]
                _queue(pipe, entry)
                try:
                    await pipe.execute()
                    return
                except WatchError:
                    continue


def _queue(pipe: Pipeline, entry: Entry) -> None:
    plain = {"spec": entry.spec.model_dump(mode="json"), "removed": entry.removed}
    pipe.sadd(keys.MODELS, entry.spec.name)
    pipe.srem(keys.RETIRED, entry.spec.name)
    pipe.hset(keys.SPECS, entry.spec.name, json.dumps(plain))
    pipe.incr(keys.SPECS_CHANGED)


def _entry(name: str, raw: bytes | str) -> Entry:
    entry = _read(raw)
    if entry is None:
        raise ConfigError(
            f"the catalogue's entry of {name} isn't this version's, and none is followed until it is: put it "
            f"again, or have it removed: interpose models remove {name}"
        )
    return entry


def _read(raw: bytes | str) -> Entry | None:
    """None if it is another version's."""
    plain = json.loads(text(raw))
    with suppress(ValidationError):
        return Entry(ModelSpec.model_validate(plain["spec"]), plain["removed"])
    return None


def _key(name: str) -> str:
    return keys.MODEL.format(model=name)
