"""The gateway's view of the models: their manifests, decoded once for each fingerprint."""

from __future__ import annotations

import time

import msgpack
from interpose.errors import ModelUnavailable, UnknownModel
from interpose.graph.manifest import Manifest, decode_manifest

from .broker.models import Hosted, Models, ModelState

FRESH_S = 1.0


class Catalogue:
    def __init__(self, models: Models) -> None:
        self._models = models
        self._hosted: dict[str, tuple[float, Hosted]] = {}
        self._manifests: dict[str, tuple[str, Manifest]] = {}

    async def ready(self, name: str, revision: str | None) -> Manifest:
        """The manifest to check a job against.

        A model whose worker restarts keeps its queue, so it takes jobs as long as its manifest is known.

        Raises:
            UnknownModel: not served here, or not at this revision.
            ModelUnavailable: never loaded so far, failed to load, or gone for long.
        """
        hosted = await self._get(name)
        if not hosted.fingerprint or hosted.state in (ModelState.FAILED, ModelState.STOPPED):
            raise ModelUnavailable(
                f"{name} is {hosted.state} here; try again later",
                details={"retry_after_s": 5, "state": hosted.state},
            )
        manifest = await self._manifest(hosted)
        if revision is not None and revision != manifest.revision:
            raise UnknownModel(
                f"{name} is served at revision {manifest.revision[:12]}, the graph was recorded against "
                f"{revision[:12]}; make the model again to read its new manifest"
            )
        return manifest

    async def _get(self, name: str) -> Hosted:
        at, hosted = self._hosted.get(name, (0.0, None))
        if hosted is None or time.monotonic() - at > FRESH_S:
            hosted = await self._models.get(name)
            self._hosted[name] = time.monotonic(), hosted
        return hosted

    async def _manifest(self, hosted: Hosted) -> Manifest:
        mark, manifest = self._manifests.get(hosted.name, ("", None))
        if manifest is None or mark != hosted.fingerprint:
            manifest = decode_manifest(msgpack.unpackb(await self._models.manifest(hosted.name)))
            self._manifests[hosted.name] = hosted.fingerprint, manifest
        return manifest
