"""The gateway's view of the models: their manifests, decoded once for each fingerprint."""

from __future__ import annotations

import time
from collections.abc import Awaitable

import msgpack
from interpose.errors import ModelLoading, ModelUnavailable, UnknownModel
from interpose.graph.manifest import Manifest, decode_manifest

from .broker.accounts import Key
from .broker.models import Hosted, Models
from .broker.queue import updating
from .broker.specs import Specs
from .broker.states import ModelState

FRESH_S = 1.0
RETRY_S = 1
"""When a client is to ask again for a model that is being loaded."""


class Catalogue:
    def __init__(self, models: Models, specs: Specs) -> None:
        self._models = models
        self._specs = specs
        self._hosted: dict[str, tuple[float, Hosted]] = {}
        self._manifests: dict[str, tuple[str, Manifest]] = {}

    async def ready(self, key: Key, name: str) -> Manifest:
        """The manifest to check a job against that came with a key.

        Whether a copy is loaded now makes no difference where one would be: jobs that wait have it loaded.

        Raises:
            UnknownModel: not served here.
            ModelLoading: never loaded so far; now it will be.
            ModelFailed: it can't be loaded.
            ModelUnavailable: gone for long, or about to go.
        """
        hosted = await self._for(key, self.lately(name))
        if hosted.removed:
            raise ModelUnavailable(
                f"{name} is being taken out of service and takes no more jobs", details={"state": "draining"}
            )
        if hosted.state is ModelState.STOPPED:
            raise ModelUnavailable(
                f"{name} is stopped here; try again later", details={"retry_after_s": 5, "state": "stopped"}
            )
        _check_loadable(hosted)
        if not hosted.fingerprint:
            await self.known(hosted)
        if hosted.updating and hosted.wanted:
            await self._specs.wish(name)  # else who only sends such a job again waits for what nobody loads
        return await self._manifest(hosted)

    async def known(self, hosted: Hosted) -> None:
        """Have a model loaded that never was, or that changes, so that its manifest becomes known.

        Raises:
            ModelLoading, ModelFailed: it isn't known yet.
        """
        if hosted.fingerprint and not hosted.updating:
            return
        _check_loadable(hosted)
        name = hosted.name
        if hosted.wanted:
            await self._specs.wish(name)
        if hosted.updating:
            raise updating(name)
        on_its_way = not hosted.wanted or hosted.state is ModelState.LOADING or await self._specs.kept()
        told = "is being loaded" if on_its_way else "is to be loaded, but what loads models here is away"
        if on_its_way and hosted.crowded:
            told = "waits until a device is free for it"
        raise ModelLoading(f"{name} {told}; try again", details={"retry_after_s": RETRY_S, "state": hosted.told})

    async def get(self, key: Key, name: str) -> Hosted:
        """How a model is. Raises UnknownModel, which names those there are that the key may use."""
        return await self._for(key, self._models.get(name))

    async def lately(self, name: str) -> Hosted:
        """How a model is, or was a moment ago. Raises UnknownModel, which names no others."""
        at, hosted = self._hosted.get(name, (0.0, None))
        if hosted is None or time.monotonic() - at > FRESH_S:
            hosted = await self._models.get(name)
            self._hosted[name] = time.monotonic(), hosted
        return hosted

    async def _for(self, key: Key, asked: Awaitable[Hosted]) -> Hosted:
        try:
            return await asked
        except UnknownModel as error:
            its = [name for name in await self._models.names() if key.allows(name)]
            raise UnknownModel(f"{error.message}; there is {', '.join(its) or 'none yet'}") from None

    def forget(self, name: str) -> None:
        """What is remembered of a model is wrong."""
        self._hosted.pop(name, None)

    async def _manifest(self, hosted: Hosted) -> Manifest:
        mark, manifest = self._manifests.get(hosted.name, ("", None))
        if manifest is None or mark != hosted.fingerprint:
            manifest = decode_manifest(msgpack.unpackb(await self._models.manifest(hosted.name)))
            self._manifests[hosted.name] = hosted.fingerprint, manifest
        return manifest


def _check_loadable(hosted: Hosted) -> None:
    """Raises ModelFailed where loading it failed, and nobody would try again now."""
    failure = hosted.failure
    if hosted.state is not ModelState.FAILED or failure is None:
        return
    if not hosted.wanted or (failure.final and failure.retry_ms > hosted.now_ms):
        raise failure.error(hosted.name, hosted.now_ms)
