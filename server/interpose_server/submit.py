"""From a submission's bytes to a queued job: decode, check, store, enqueue."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import TypeVar

import msgpack
from interpose.errors import InvalidPayload, MissingAttachment
from interpose.graph.adapters import check_revision, revision_of_all
from interpose.graph.codec import encode_graph
from interpose.graph.footprint import Footprint
from interpose.graph.manifest import Manifest
from interpose.graph.validate import validate
from interpose.wire.protocol import JSON, MSGPACK
from interpose.wire.status import JobStatus
from interpose.wire.submission import Submission, decode_submission

from . import attachments, blob_keys
from .auth import allow
from .broker.accounts import Key
from .broker.jobs import NewJob
from .broker.queue import ServedOtherwise, updating
from .parts import Parts

QUICK_BYTES = 32 << 10
"""Up to here a submission is checked on the event loop: a thread would cost more than it frees."""

T = TypeVar("T")


async def submit(
    parts: Parts, key: Key, body: bytes, content_type: str, named: str | None = None
) -> tuple[Submission, JobStatus, int | None]:
    """Accept a job. Returns it, its status and, if it is new, its place in the queue.

    Args:
        named: the id it must have.

    Raises:
        InterposeError: whatever is wrong with it; nothing is queued then.
    """
    limits = parts.settings.limits
    kind = JSON if content_type == JSON else content_type or MSGPACK
    large = len(body) > QUICK_BYTES
    job = await _maybe_thread(large, lambda: decode_submission(body, limits, kind))
    if named not in (None, job.id):
        raise InvalidPayload("a submission is sent under another id than its own")
    allow(key, job.model)
    digest = hashlib.sha256(body).hexdigest()
    try:
        return await _hand_in(parts, key, job, digest, large)
    except ServedOtherwise:
        # Another version came since the manifest was read, a moment ago.
        parts.catalogue.forget(job.model)
    try:
        return await _hand_in(parts, key, job, digest, large)
    except ServedOtherwise:
        raise updating(job.model) from None


async def _hand_in(
    parts: Parts, key: Key, job: Submission, digest: str, large: bool
) -> tuple[Submission, JobStatus, int | None]:
    """Check a job against its model, store and enqueue it."""
    limits = parts.settings.limits
    manifest = await parts.catalogue.ready(key, job.model)
    footprint = await _maybe_thread(large, lambda: _check(parts, job, manifest))
    payload = await _maybe_thread(large, lambda: _packed(job))
    inline = len(payload) <= parts.settings.inline_bytes
    if job.graph.attachments or not inline:
        await parts.blobs.run(lambda: _store(parts, key, job, b"" if inline else payload, digest))
    status, place = await parts.broker.queue.submit(
        NewJob(
            user=key.user,
            id=job.id,
            model=job.model,
            digest=digest,
            payload=payload if inline else b"",
            blob="" if inline else digest,
            footprint=footprint,
            timeout_s=min(job.timeout_s or limits.wall_s, limits.wall_s),
            key=key.id,
            key_digest=key.digest,
            revision=job.revision or "",
            served=revision_of_all(manifest),
        )
    )
    parts.metrics.jobs.labels(job.model).inc()
    parts.metrics.tokens.labels(job.model).inc(footprint.tokens)
    return job, status, place


def _check(parts: Parts, job: Submission, manifest: Manifest) -> Footprint:
    if job.revision is not None:
        check_revision(job.revision, job.graph.runs, manifest)
    return validate(job.graph, manifest, parts.settings.limits, batching=job.batching).footprint


def _packed(job: Submission) -> bytes:
    """The graph's msgpack."""
    payload: bytes = msgpack.packb(encode_graph(job.graph))
    return payload


def _store(parts: Parts, key: Key, job: Submission, payload: bytes, digest: str) -> None:
    """Keep attachments, and the graph's msgpack if there is any."""
    ttl_s = parts.settings.queue_ttl_s + parts.settings.result_ttl_s
    missing = []
    for sha, spec in job.graph.attachments.items():
        if sha in job.attachments:
            attachments.store(parts.blobs, key.user, sha, spec, job.attachments[sha], ttl_s)
        elif parts.blobs.keep(blob_keys.tensor(key.user, sha), ttl_s) is None:
            missing.append(sha)
    if missing:
        raise MissingAttachment(
            f"{len(missing)} of the job's tensors were never uploaded, or have expired: {missing[0]}",
            details={"missing": missing[:64]},
        )
    if payload:
        parts.blobs.put(blob_keys.payload(key.user, digest), [payload], ttl_s)


async def _maybe_thread(large: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if large else work()
