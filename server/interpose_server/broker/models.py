"""What workers publish of their models, and how each copy of a model is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack
from interpose.errors import InternalError, InterposeError, ModelUnavailable, UnknownModel
from interpose.graph.adapters import revision_of_all
from interpose.graph.manifest import Manifest, encode_manifest, fingerprint
from redis.asyncio import Redis

from ..settings import Settings
from . import keys
from .answers import text
from .failures import TOO_LARGE, Failure, reason_of
from .scripts import Scripts
from .states import ModelState, derive

FIELDS = (
    *("fingerprint", "revision", "tokenizer", "batches", "jobs", "busy_s"),
    *("ready_ms", "wish_ms", "evict", "note", "crowded", "served", "closed"),
)

LOST_AFTER = 4
"""A copy that is silent for so many times as long as one may be that has jobs to run counts as lost."""

PLANNED = "(planned)"
"""In a worker's place where none was begun."""


@dataclass(frozen=True, slots=True)
class Hosted:
    """One model. `fingerprint` is empty until a worker has loaded it for the first time.

    Attributes:
        copies: worker -> state, of those heard of lately.
        batches, jobs: how many were run so far; a batch is one or more jobs that were given to the engine together.
        busy_s: how long the engines have worked on them.
        budget: what a batch may hold, and the measurements that says it, for people.
        failure: why the last try to load it failed; None if it didn't.
        wanted: it is in the catalogue and stays there, so that it is loaded when somebody asks.
        removed: it is being taken out of the catalogue.
        now_ms, ready_ms: when this was read, and when a copy last became ready; 0 never. By the broker's clock.
        wished: somebody asked for it to be loaded, and it hasn't been since.
        evicted: somebody asked for it to go as soon as it has no work.
        note: what was last decided about its copies, and why, for the operator.
        crowded: somebody waits for it, and there was no room for it when that was last decided.
        updating: jobs that were recorded against what is known of it are taken no more: it comes back as another.
    """

    name: str
    state: ModelState
    copies: Mapping[str, ModelState]
    fingerprint: str
    revision: str
    tokenizer: str
    batches: int = 0
    jobs: int = 0
    busy_s: float = 0.0
    budget: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    wanted: bool = False
    removed: bool = False
    now_ms: int = 0
    ready_ms: int = 0
    wished: bool = False
    evicted: bool = False
    note: str = ""
    crowded: bool = False
    updating: bool = False

    @property
    def told(self) -> str:
        """Why somebody waits for it: its state, or "crowded" where there is no room for it."""
        return "crowded" if self.crowded and self.state is ModelState.COLD else str(self.state)

    def count(self, state: ModelState) -> int:
        """Copies in a state."""
        return sum(own is state for own in self.copies.values())

    @property
    def barred(self) -> bool:
        """Whether loading it failed, and it isn't time to try again."""
        return self.failure is not None and self.failure.retry_ms > self.now_ms

    def barred_for(self, reason: str) -> bool:
        """Whether it is barred, and that is why."""
        return self.barred and self.failure is not None and self.failure.reason == reason

    def to_plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "id": self.name,
            "state": str(self.state),
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "budget": dict(self.budget),
            "copies": self.count(ModelState.READY),
        }
        failed = self.state is ModelState.FAILED and self.failure is not None
        return {**plain, "failure": self.failure.to_plain()} if failed and self.failure else plain


class Lost(NamedTuple):
    """A copy of which nothing is heard."""

    model: str
    worker: str
    state: ModelState
    silent_s: float


class Models:
    """A copy that was silent for longer than the settings' lease counts as gone."""

    def __init__(self, redis: Redis, scripts: Scripts, settings: Settings) -> None:
        self._redis = redis
        self._run = scripts
        self._silent_ms = settings.silent_ms
        self._ttl_ms = int(settings.result_ttl_s * 1000)
        self._retry_s = settings.load_retry_s

    async def announce(
        self,
        name: str,
        worker: str,
        state: ModelState,
        why: BaseException | None = None,
        *,
        since: ModelState | None = None,
        waiting_end: bool = True,
    ) -> bool:
        """A worker says what it is doing; stopped is its last word. Ready counts only after `publish`.

        Args:
            why: what loading raised, of one that failed. Jobs that wait for the model end with it where no other
                copy is left and trying again by itself is in vain.
            since: the state it must be in so far; None for any.
            waiting_end: whether they do.

        Returns:
            Whether its copy may be in this state: one that was told to drain isn't ready again.
        """
        failure, problem = b"", b""
        if state is ModelState.FAILED:
            before = Failure.unpack(await self._redis.hget(_key(name), "failure"))
            seconds, micros = await self._redis.time()
            now_ms = seconds * 1000 + micros // 1000
            failed = Failure.after(before, why or InternalError("it failed"), now_ms, self._retry_s)
            failure = failed.pack()
            if failed.final and waiting_end:
                problem = msgpack.packb(failed.error(name, failed.at_ms).to_wire())
        allowed, _ = await self._run(
            "announce", keys.check_model(name), worker, str(state), self._silent_ms, failure, problem, self._ttl_ms,
            str(since or ""),
        )  # fmt: skip
        return bool(allowed)

    async def publish(
        self, name: str, worker: str, manifest: Manifest, tokenizer: str, budget: Mapping[str, Any] | None = None
    ) -> None:
        """Make a loaded model known, ready for jobs.

        Args:
            tokenizer: name of the blob with its tokenizer file, "" without one.
            budget: what its batches may hold, for people. Not of the manifest: it differs from load to load.

        Raises:
            ModelUnavailable: this copy was told to drain meanwhile.
        """
        await self.describe(name, worker, manifest, tokenizer, budget)
        if not await self.announce(name, worker, ModelState.READY):
            raise ModelUnavailable(f"this copy of {name} is wanted no longer")

    async def describe(
        self, name: str, worker: str, manifest: Manifest, tokenizer: str, budget: Mapping[str, Any] | None = None
    ) -> None:
        """Have a model serve what one of its copies does from now on. Arguments as of `publish`."""
        served = revision_of_all(manifest)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hdel(_key(name), "closed")
            pipe.hset(
                _key(name),
                mapping={
                    "served": served,
                    "manifest": msgpack.packb(encode_manifest(manifest)),
                    "fingerprint": fingerprint(manifest),
                    "revision": manifest.revision,
                    "tokenizer": tokenizer,
                    "budget": msgpack.packb(dict(budget or {})),
                },
            )
            pipe.hset(keys.SERVED.format(model=name), worker, served)
            await pipe.execute()

    async def outlived(self, name: str, worker: str) -> bool:
        """Whether a model counts as serving what none of its copies does by now, and this one could speak for it.

        Its jobs would wait for ever: they are left to copies that are gone.
        """
        return bool(await self._run("outlived", name, worker, LOST_AFTER * self._silent_ms))

    async def close(self, name: str, worker: str, *, replaced: bool) -> bool:
        """A copy is told to go. It drains at once, unless jobs were recorded against what only it serves.

        Args:
            replaced: the model's next copy will serve something else.

        Returns:
            Whether it stays until those jobs are done; none are accepted beyond them. May be asked again.
        """
        return bool(await self._run("close", name, worker, self._silent_ms, int(replaced)))

    async def owed(self, name: str, worker: str) -> bool:
        """Whether jobs wait or run that were recorded against what a copy serves."""
        return bool(await self._run("owed", name, worker))

    async def beat(self, name: str, worker: str, batches: int = 0, jobs: int = 0, busy_s: float = 0.0) -> None:
        """A worker is alive, and has run so many more batches and jobs, for so long, since it last said so."""
        await self._run("beat", name, worker, batches, jobs, busy_s, "")

    async def vouch(self, name: str, worker: str) -> tuple[int, int]:
        """Whoever started a worker sees that its process lives. Says nothing of one that should speak for itself by
        now, as it doesn't load any more.

        Returns:
            When something was heard of it before this, and after it, in ms by the broker's clock; 0 never. It has
            spoken itself if the first isn't what the second was the last time.
        """
        before_ms, after_ms = await self._run("beat", name, worker, 0, 0, 0, str(ModelState.LOADING))
        return int(before_ms), int(after_ms)

    async def rejoin(
        self, name: str, worker: str, manifest: Manifest, tokenizer: str, budget: Mapping[str, Any] | None = None
    ) -> bool:
        """Tell of a copy that runs jobs, but was taken for gone: it was cut off for long, or the broker lost all it
        knew. Arguments as of `publish`.

        Returns:
            Whether it had to be told of. Of a model that was taken out of the catalogue for good it isn't.
        """
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hexists(keys.STATES.format(model=name), worker)
            pipe.sismember(keys.RETIRED, name)
            pipe.hexists(_key(name), "served")
            known, retired, described = await pipe.execute()
        if known or retired:
            return False
        if described:
            # Others may have come that serve something else: then that is what new jobs are recorded against.
            await self._redis.hset(keys.SERVED.format(model=name), worker, revision_of_all(manifest))
        else:
            await self.describe(name, worker, manifest, tokenizer, budget)
        return await self.announce(name, worker, ModelState.READY)

    async def get(self, name: str) -> Hosted:
        """Raises UnknownModel."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.sismember(keys.MODELS, name)
            pipe.hmget(_key(name), [*FIELDS, "budget", "failure"])
            pipe.hgetall(keys.STATES.format(model=name))
            pipe.zrange(keys.HEARD.format(model=name), 0, -1, withscores=True)
            pipe.hget(keys.SPECS, name)
            (seconds, micros), known, (*found, budget, failure), states, heard, entry = await pipe.execute()
        if not known:
            raise _unknown(name)
        now_ms = seconds * 1000 + micros // 1000
        own = {text(worker): ModelState(text(state)) for worker, state in states.items()}
        live = [text(worker) for worker, at in heard if now_ms - at <= self._silent_ms]
        copies = {worker: own[worker] for worker in live if worker in own}
        mark, revision, tokenizer, batches, jobs, busy, ready_ms, wish_ms, evict, note, crowded, *rest = map(
            text, found
        )
        serves, closed = rest
        failed = Failure.unpack(failure)
        removed = entry is not None and json.loads(entry)["removed"]
        wanted = entry is not None and not removed
        return Hosted(
            name=name,
            state=derive(copies.values(), wanted=wanted, failed=failed is not None, removed=removed),
            copies=copies,
            fingerprint=mark,
            revision=revision,
            tokenizer=tokenizer,
            batches=int(batches or 0),
            jobs=int(jobs or 0),
            busy_s=float(busy or 0),
            budget=msgpack.unpackb(budget) if budget else {},
            failure=failed,
            wanted=wanted,
            removed=removed,
            now_ms=now_ms,
            ready_ms=int(ready_ms or 0),
            wished=int(wish_ms or 0) > now_ms,
            evicted=bool(evict),
            note=note,
            crowded=crowded == "1",
            updating=bool(closed) and closed == serves,
        )

    async def manifest(self, name: str) -> bytes:
        """The manifest's msgpack. Raises UnknownModel."""
        raw = await self._redis.hget(_key(name), "manifest")
        if raw is None:
            raise _unknown(name)
        assert isinstance(raw, bytes)
        return raw

    async def names(self) -> tuple[str, ...]:
        """Of all models that are served here, or could be."""
        return tuple(sorted(map(text, await self._redis.smembers(keys.MODELS))))

    async def note(self, notes: Mapping[str, str]) -> None:
        """Keep for the operator, by model, what was decided about its copies."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for name, note in notes.items():
                pipe.hset(_key(name), "note", note)
            await pipe.execute()

    async def crowd(self, changed: Mapping[str, bool]) -> None:
        """Of models that are waited for: whether there is no room for them."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for name, crowded in changed.items():
                pipe.hset(_key(name), "crowded", int(crowded))
            await pipe.execute()

    async def forget(self, name: str) -> None:
        """Stop listing a model that is no longer served here."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.srem(keys.MODELS, name)
            parts = (keys.STATES, keys.HEARD, keys.SERVED, keys.TALLY)
            pipe.delete(_key(name), *(part.format(model=name) for part in parts))
            pipe.hdel(keys.SPECS, name)
            pipe.incr(keys.SPECS_CHANGED)
            await pipe.execute()

    async def retire(self, name: str) -> bool:
        """Forget a model that was taken out of the catalogue, unless it has jobs or copies. Whether it was.

        From then on no job is accepted for it, whatever a gateway believes.
        """
        return bool(await self._run("retire", name, self._silent_ms))

    async def give_up(self, name: str, error: ModelUnavailable) -> list[str]:
        """End the jobs that wait for a model with an error. Returns their refs."""
        problem = msgpack.packb(error.to_wire())
        refs = await self._run("give_up", keys.check_model(name), problem, self._ttl_ms, 0)
        return [ref.decode() for ref in refs]

    async def refuse(self, name: str, why: InterposeError, *, joining: bool = False) -> None:
        """Note that a model can't be loaded, before any worker tried.

        What waits for it ends with that, but for one that is too large and was loaded before: nodes may be away.

        Args:
            joining: nodes may be about to come, too, so that for none that is too large anything ends.
        """
        away = reason_of(why) == TOO_LARGE and (joining or bool(await self._redis.hget(_key(name), "ready_ms")))
        await self.announce(name, PLANNED, ModelState.FAILED, why, waiting_end=not away)
        await self.announce(name, PLANNED, ModelState.STOPPED)

    async def forgive(self, name: str, reason: str) -> None:
        """That a model couldn't be loaded is over, if this was why."""
        failure = Failure.unpack(await self._redis.hget(_key(name), "failure"))
        if failure is not None and failure.reason == reason:
            await self._redis.hdel(_key(name), "failure")

    async def lost(self) -> list[Lost]:
        """Copies that were silent for so long that, whatever keeps them, nobody waits for them any more."""
        found = []
        for name in await self.names():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.time()
                pipe.hgetall(keys.STATES.format(model=name))
                pipe.zrange(keys.HEARD.format(model=name), 0, -1, withscores=True)
                (seconds, micros), states, scores = await pipe.execute()
            now_ms, heard = seconds * 1000 + micros // 1000, {text(worker): int(at) for worker, at in scores}
            for worker, state in ((text(worker), ModelState(text(state))) for worker, state in states.items()):
                if (silent_ms := now_ms - heard.get(worker, 0)) > LOST_AFTER * self._silent_ms:
                    found.append(Lost(name, worker, state, silent_ms / 1000))
        return found

    async def bury(self) -> list[str]:
        """Note of each copy that fell silent while it loaded that loading failed. Returns their workers' names.

        Silence is no proof: a process may starve on a busy machine. So this waits for long. Who started a worker,
        or Ray, knows sooner if it died.
        """
        buried = []
        for lost in await self.lost():
            if lost.state is not ModelState.LOADING:
                continue
            why = InternalError(
                f"nothing was heard of {lost.worker} for {lost.silent_s:.0f} s while it loaded {lost.model}"
            )
            # Others may be at it, too, and it failed only once.
            if await self.announce(lost.model, lost.worker, ModelState.FAILED, why, since=ModelState.LOADING):
                await self.announce(lost.model, lost.worker, ModelState.STOPPED)
                buried.append(lost.worker)
        return buried

    async def list(self) -> list[Hosted]:
        """All but those that are removed while they are looked at."""
        found = []
        for name in await self.names():
            with suppress(UnknownModel):
                found.append(await self.get(name))
        return found


def _unknown(name: str) -> UnknownModel:
    """It doesn't name those there are: who asks may not be allowed to know."""
    return UnknownModel(f"no model {name!r} is served here")


def _key(name: str) -> str:
    return keys.MODEL.format(model=name)
