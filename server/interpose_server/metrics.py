"""Figures for Prometheus. Nothing in them comes from a job's content, and no user is named."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)


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
        self.waiting = Gauge("interpose_waiting", "Jobs waiting", ["model"], registry=self.registry)
        self.ready = Gauge("interpose_model_ready", "1 if the model runs jobs", ["model"], registry=self.registry)
        self.batches = Gauge("interpose_batches", "Batches run", ["model"], registry=self.registry)
        self.ran = Gauge("interpose_batched_jobs", "Jobs run, over all batches", ["model"], registry=self.registry)
        self.busy = Gauge(
            "interpose_busy_seconds", "Time the engine has worked on batches", ["model"], registry=self.registry
        )
        self.blob_bytes = Gauge("interpose_blob_bytes", "Bytes in the blob store", registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
