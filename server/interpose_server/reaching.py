"""Whether broker, blob store and models are there, for those who ask without a key: once a second, whoever asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from interpose.errors import ConfigError, StorageUnavailable
from redis.exceptions import RedisError

from .blobs import Blobs
from .broker.connect import Broker
from .broker.models import Hosted
from .broker.states import ModelState
from .tasks import within

ANSWERS_S = 3.0
"""Broker and blob store are given so long. Who asks for figures waits ten seconds as a rule, then asks again."""

FRESH_S = 1.0
STORED_FRESH_S = 2.0
"""How old answers may be; asking a bucket costs more than asking the broker."""


@dataclass(frozen=True, slots=True)
class Reached:
    """Attributes:
    status: in a word or two; "ok" if jobs can be taken.
    models: that are served here, or could be.
    named: whether whoever has no key may see their names: not where some keys are for some of them only.
    """

    status: str
    models: Sequence[Hosted] = ()
    named: bool = False

    @property
    def ready(self) -> int:
        """Models that run jobs."""
        return sum(model.state is ModelState.READY for model in self.models)


async def look(broker: Broker, stored: Callable[[], Awaitable[bool]]) -> Reached:
    """Args: stored: whether the blob store answers; TimeoutError says that it hangs."""
    try:
        models, on_demand, named = await within(ANSWERS_S, _known(broker))
    except (RedisError, OSError):
        return Reached("no broker")
    if not await _in_time(stored):
        return Reached("no blob store", models, named)
    found = Reached("ok", models, named)
    return found if found.ready or on_demand else Reached("no model ready", models, named)


async def _known(broker: Broker) -> tuple[Sequence[Hosted], bool, bool]:
    """The models, whether any are loaded on demand, and whether whoever has no key may see their names."""
    return (
        await broker.models.list(),
        await _on_demand(broker),
        not any(key.models for key in await broker.accounts.list()),
    )


async def _on_demand(broker: Broker) -> bool:
    try:
        return bool(await broker.specs.list())
    except ConfigError:
        return False  # an entry is another version's: nothing is loaded until it is mended, what is loaded serves


async def _in_time(stored: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await stored()
    except TimeoutError:
        return False


async def reaches(blobs: Blobs) -> bool:
    """Whether the blob store answers."""
    try:
        await blobs.ask(blobs.reach)
    except (StorageUnavailable, OSError):
        return False
    return True
