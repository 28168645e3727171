"""From a claimed job to one the engine can begin at once: decoded, checked, compiled, its tensors where it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgpack
import torch
from interpose.errors import InternalError, InterposeError, InvalidPayload, ModelUpdated, StorageUnavailable
from interpose.graph.adapters import check_revision
from interpose.graph.codec import decode_graph
from interpose.graph.manifest import Manifest
from interpose.graph.model import Graph
from interpose.runtime.engine import EngineJob

from .. import blob_keys
from ..blobs import Blobs, whole
from ..broker.jobs import Claim
from ..settings import Settings
from .shelf import Shelf
from .sink import JobSink

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparer:
    """For jobs of one model. Called from any thread.

    Attributes:
        model: the name it is served under.
        prepare: does what the engine would do first: checks the graph and compiles it.
        give_back: takes jobs that can't be read now, as the blob store is away.
    """

    model: str
    manifest: Manifest
    blobs: Blobs
    shelf: Shelf
    settings: Settings
    prepare: Callable[[EngineJob], EngineJob]
    give_back: Callable[[JobSink], None]

    def ready(self, sinks: list[JobSink]) -> list[tuple[JobSink, EngineJob]]:
        """Jobs the engine can begin; those that can't be are ended, or given back."""
        found = []
        for sink in sinks:
            try:
                found.append((sink, self._prepared(sink)))
            except StorageUnavailable:
                self.give_back(sink)
            except InterposeError as error:
                sink.end(error, 0)
            except OSError as error:
                log.error("a job can't be read: %s", error)
                sink.end(InternalError("the server couldn't read the job"), 0)
            except Exception:
                # A fault of ours, or no memory for its tensors: the worker and the others go on.
                log.exception("a job can't be prepared")
                sink.end(InternalError("the server failed while preparing this job"), 0)
        return found

    def _prepared(self, sink: JobSink) -> EngineJob:
        claim = sink.claim
        graph = self._graph(claim)
        if claim.revision:
            # It was checked when it was submitted; since then the worker may have come back with other weights.
            try:
                check_revision(claim.revision, graph.runs, self.manifest)
            except ModelUpdated as error:
                raise ModelUpdated(f"the model was updated while your job waited: {error.message}") from None
        job = EngineJob(
            graph=graph,
            attachments=self._attachments(claim, graph),
            sink=sink,
            limits=sink.limits,
            exclusive=claim.footprint.exclusive or claim.alone,
            owner=claim.user,
        )
        return self.prepare(job)

    def _graph(self, claim: Claim) -> Graph:
        payload: bytes | bytearray | None = claim.payload
        if claim.blob:
            payload = whole(self.blobs, blob_keys.payload(claim.user, claim.blob))
        if payload is None:
            raise InvalidPayload("the job's payload has expired; submit it again")
        return decode_graph(msgpack.unpackb(payload), self.settings.limits)

    def _attachments(self, claim: Claim, graph: Graph) -> dict[str, torch.Tensor]:
        inputs = {sha for run in graph.runs for invoke in run.invokes for sha in invoke.tensors.values()}
        return {
            sha: self.shelf.get(claim.user, sha, spec, placed=sha not in inputs)
            for sha, spec in graph.attachments.items()
        }
