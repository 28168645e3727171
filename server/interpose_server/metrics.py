"""Figures for Prometheus. Nothing in them comes from a job's content, and no user is named."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from interpose.errors import StorageUnavailable
from interpose.wire.status import JobStatus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from redis.exceptions import RedisError

from .broker.connect import Broker
from .broker.jobs import Demand
from .broker.models import Hosted
from .broker.states import ModelState
from .reaching import ANSWERS_S
from .tasks import within

T = TypeVar("T")

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)


_Model: TypeAlias = tuple[Hosted, Demand, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Figures:
    """What broker and blob store know; None of one that didn't answer.

    Attributes:
        models: how each is, what is asked of it, its tally.
    """

    models: Sequence[_Model] | None
    blob_bytes: int | None


async def count(broker: Broker, used: Callable[[], Awaitable[int]]) -> Figures:
    """Within a few seconds, whatever has become of broker and store.

    Args:
        used: bytes in the blob store; raises TimeoutError before long, or what the store does.
    """
    asked = _answer(within(ANSWERS_S, _models(broker))), _answer(used())
    return Figures(*await asyncio.gather(*asked))


async def _models(broker: Broker) -> list[_Model]:
    models, queue = await broker.models.list(), broker.queue
    return [(model, await queue.demand(model.name), await queue.tally(model.name)) for model in models]


async def _answer(asked: Awaitable[T]) -> T | None:
    try:
        return await asked
    except (RedisError, StorageUnavailable, OSError):
        return None


class Metrics:
    """One app's registry: several apps in one process don't collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "interpose_requests", "HTTP requests", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "interpose_request_seconds", "Time to answer", ["route"], buckets=_BUCKETS, registry=self.registry
        )
        self.jobs = Counter("interpose_jobs", "Jobs accepted", ["model"], registry=self.registry)
        self.streams = Gauge("interpose_streams", "Open websockets", registry=self.registry)
        self.downloads = Gauge("interpose_downloads", "Saves being fetched", registry=self.registry)
        self.sent = Counter("interpose_stream_bytes", "Bytes of saves sent", registry=self.registry)
        self.tokens = Counter(
            "interpose_tokens", "Tokens of the jobs accepted, padding included", ["model"], registry=self.registry
        )
        self.broker = Gauge("interpose_broker_up", "1 if the broker answers", registry=self.registry)
        self.storage = Gauge("interpose_storage_up", "1 if the blob store answers", registry=self.registry)
        self.waiting = self._gauge("interpose_waiting", "Jobs waiting")
        self.running = self._gauge("interpose_running", "Jobs on a worker")
        self.oldest = self._gauge("interpose_oldest_wait_seconds", "How long the job has waited that waits longest")
        self.ready = self._gauge("interpose_model_ready", "1 if the model runs jobs")
        self.failed = self._gauge("interpose_model_failed", "1 if the model couldn't be loaded")
        self.copies = self._gauge("interpose_copies", "Copies of the model", "state")
        self.batches = self._gauge("interpose_batches", "Batches run")
        self.ran = self._gauge("interpose_batched_jobs", "Jobs run, over all batches")
        self.busy = self._gauge("interpose_busy_seconds", "Time the engines have worked on batches")
        self.ended = self._gauge("interpose_ended_jobs", "Jobs ended", "outcome")
        self.started = self._gauge("interpose_started_jobs", "Times a job was given to a worker")
        self.requeued = self._gauge("interpose_requeued_jobs", "Times a job went back to the queue")
        self.waited = self._gauge("interpose_wait_seconds", "How long jobs waited, from submission to each start")
        self.blob_bytes = Gauge("interpose_blob_bytes", "Bytes in the blob store", registry=self.registry)
        self.blob_cap = Gauge("interpose_blob_cap_bytes", "Bytes it may hold", registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(name, help, ["model", *labels], registry=self.registry)

    def note(self, figures: Figures) -> None:
        now = (self.waiting, self.running, self.oldest, self.ready, self.failed, self.copies)
        so_far = (self.batches, self.ran, self.busy, self.ended, self.started, self.requeued, self.waited)
        for gauge in (*now, *so_far):
            gauge.clear()  # Models come and go.
        self.broker.set(figures.models is not None)
        self.storage.set(figures.blob_bytes is not None)
        self.blob_bytes.set(math.nan if figures.blob_bytes is None else figures.blob_bytes)
        for hosted, demand, tally in figures.models or ():
            name = hosted.name
            self.waiting.labels(name).set(demand.waiting)
            self.running.labels(name).set(demand.running)
            self.oldest.labels(name).set(max(hosted.now_ms - demand.oldest_ms, 0) / 1000 if demand.oldest_ms else 0)
            self.ready.labels(name).set(hosted.state is ModelState.READY)
            self.failed.labels(name).set(hosted.state is ModelState.FAILED)
            for state in ModelState:
                self.copies.labels(name, state).set(hosted.count(state))
            self.batches.labels(name).set(hosted.batches)
            self.ran.labels(name).set(hosted.jobs)
            self.busy.labels(name).set(hosted.busy_s)
            for outcome in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED):
                self.ended.labels(name, outcome).set(tally.get(outcome, 0))
            self.started.labels(name).set(tally.get("running", 0))
            self.requeued.labels(name).set(tally.get("requeued", 0))
            self.waited.labels(name).set(tally.get("wait_ms", 0) / 1000)

    def text(self) -> bytes:
        return generate_latest(self.registry)
