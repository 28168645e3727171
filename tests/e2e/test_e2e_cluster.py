"""Two gateways and two workers of one model, over one broker and one bucket: it doesn't matter who is asked."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from buckets import S3
from clients import LONG, figures, until
from cluster import Cluster, Verb, run_cluster
from interpose import LanguageModel
from interpose.errors import InterposeError, JobCancelled, Unauthorized
from interpose.job import Job
from models import tiny
from proxies import proxied
from rig import Valkey, run_valkey
from workloads import slow

PROMPT = "The capital of France is"
BIG = 64 << 20


@dataclass
class Lab:
    cluster: Cluster
    hosts: list[str]
    gateways: list[Verb]
    workers: list[Verb]
    s3: S3
    bucket: str
    valkey: Valkey

    def model(self, host: str) -> Any:
        return LanguageModel("tiny", host=host, api_key=self.cluster.key)

    def get(self, host: str, path: str, key: str = "") -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.cluster.key}"}
        return httpx.get(host + path, headers=headers, trust_env=False, timeout=60)


@pytest.fixture(scope="module")
def cluster_lab(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    valkeys = run_valkey()
    valkey, bucket = next(valkeys), s3.bucket()
    env = {
        **s3.env(),
        "INTERPOSE_SERVER_REDIS_URL": valkey.url,
        "INTERPOSE_SERVER_BLOBS": bucket,
        "INTERPOSE_SERVER_LEASE_S": "6",
        "INTERPOSE_SERVER_METRICS_OPEN": "1",
        "INTERPOSE_SERVER_DRAIN_S": "6",
    }
    with run_cluster(tmp_path_factory.mktemp("cluster"), env) as cluster, ThreadPoolExecutor() as threads:
        workers = [threads.submit(cluster.worker, f"tiny={tiny('gpt2')}") for _ in range(2)]
        gateways = [threads.submit(cluster.gateway) for _ in range(2)]
        verbs, hosts = zip(*(gateway.result() for gateway in gateways), strict=True)
        found = [worker.result() for worker in workers]
        yield Lab(cluster, list(hosts), list(verbs), found, s3, bucket, valkey)
    next(valkeys, None)


def one_row(model: Any, value: float = 1.0) -> Any:
    with model.trace(PROMPT, remote=True):
        return (model.transformer.h[1].output[0][0, -1] * value).save()


def big(model: Any, **options: Any) -> tuple[Any, Any, Any]:
    """A save of 64 MB, and what it is made of."""
    factors = np.arange(BIG // 256, dtype=np.float32)[:, None]
    with model.trace(PROMPT, remote=True, **options) as tracer:
        row = model.transformer.h[1].output[0][0, -1]
        return tracer, row.save(), (row.unsqueeze(0) * factors).save()


def is_right(small: Any, large: Any) -> bool:
    factors = np.arange(BIG // 256, dtype=np.float32)[:, None]
    return large.nbytes == BIG and np.array_equal(np.asarray(large), np.asarray(small) * factors)


def test_a_job_handed_in_here_is_known_there(cluster_lab: Lab) -> None:
    one, other = cluster_lab.hosts
    expected = np.asarray(one_row(cluster_lab.model(one)))
    assert np.array_equal(np.asarray(one_row(cluster_lab.model(other))), expected)
    model = cluster_lab.model(one)
    with model.trace(PROMPT, remote=True, blocking=False) as tracer:
        model.transformer.h[1].output[0][0, -1].save()
    job = Job.attach(tracer.job.id, host=other, api_key=cluster_lab.cluster.key)
    (value,) = job.result(timeout=90).values()
    assert np.array_equal(np.asarray(value), expected)


def test_a_large_save_goes_on_at_the_other_gateway_where_one_broke_off(cluster_lab: Lab) -> None:
    one, other = cluster_lab.hosts
    cut = [20 << 20, 5 << 20]
    with proxied(one, cut, b"/saves/") as proxy:
        proxy.retarget(other, after_a_cut=True)
        _, small, large = big(cluster_lab.model(proxy.address))
        assert not cut
    assert is_right(small, large)
    for host in (one, other):
        assert figures(cluster_lab.cluster.served(host))["interpose_stream_bytes_total"] > 0


def test_attachments_are_uploaded_once_whoever_took_them(cluster_lab: Lab) -> None:
    table = np.arange(1 << 18, dtype=np.float32)
    before = len([name for name in cluster_lab.s3.list(cluster_lab.bucket) if "/tensor/" in name])
    for host in cluster_lab.hosts * 2:
        model = cluster_lab.model(host)
        with model.trace(PROMPT, remote=True):
            sums = (model.transformer.h[0].output[0][0, -1, 0] * 0 + table).sum().save()
        assert float(np.asarray(sums)) == pytest.approx(float(table.sum()), rel=1e-3)
    after = len([name for name in cluster_lab.s3.list(cluster_lab.bucket) if "/tensor/" in name])
    assert after == before + 1


def test_cancelling_at_the_other_gateway(cluster_lab: Lab) -> None:
    one, other = cluster_lab.hosts
    model = cluster_lab.model(one)
    tracer, _, _ = slow(model, LONG, remote=True, blocking=False)
    until(lambda: tracer.job.status == "running")
    path = f"/v1/jobs/{tracer.job.id}"
    headers = {"Authorization": f"Bearer {cluster_lab.cluster.key}"}
    httpx.delete(other + path, headers=headers, trust_env=False, timeout=60).raise_for_status()
    with pytest.raises(JobCancelled):
        tracer.job.result(timeout=90)


def test_a_key_that_is_revoked_here_is_cut_off_there(cluster_lab: Lab) -> None:
    one, other = cluster_lab.hosts
    headers = {"Authorization": f"Bearer {cluster_lab.cluster.key}"}
    made = httpx.post(
        f"{one}/v1/admin/keys", json={"user": "bob"}, headers=headers, trust_env=False, timeout=60
    ).json()
    model = LanguageModel("tiny", host=other, api_key=made["token"])
    tracer, _, _ = slow(model, 60, remote=True, blocking=False)
    until(lambda: tracer.job.status == "running")
    httpx.delete(
        f"{one}/v1/admin/keys/{made['id']}", headers=headers, trust_env=False, timeout=60
    ).raise_for_status()
    with pytest.raises(Unauthorized):
        tracer.job.result(timeout=90)
    assert cluster_lab.get(other, "/v1/me", made["token"]).status_code == 401


def test_both_gateways_tell_the_same_of_the_models(cluster_lab: Lab) -> None:
    names = "interpose_blob_bytes", 'interpose_model_ready{model="tiny"}', 'interpose_waiting{model="tiny"}'

    def same() -> Any:
        found = [figures(cluster_lab.cluster.served(host)) for host in cluster_lab.hosts]
        return found if all(found[0][name] == found[1][name] for name in names) else None

    one, other = until(same)  # they are asked one after the other
    accepted = 'interpose_jobs_total{model="tiny"}'
    assert one[accepted] > 0 and other[accepted] > 0, "each counts what it took itself"


def many(lab: Lab, count: int) -> list[Any]:
    """Jobs by turns at both gateways, all under way at once. Returns what each saved, or its error."""
    models = [lab.model(host) for host in lab.hosts]

    def run(index: int) -> Any:
        try:
            return np.asarray(one_row(models[index % 2], float(index)))
        except InterposeError as error:
            return error

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(run, range(count)))


def test_a_killed_worker_costs_no_job(cluster_lab: Lab) -> None:
    unit = np.asarray(one_row(cluster_lab.model(cluster_lab.hosts[0])))
    with ThreadPoolExecutor(1) as beside:
        found = beside.submit(many, cluster_lab, 60)
        time.sleep(0.3)
        cluster_lab.workers[0].stop(signal.SIGKILL)
        values = found.result()
    assert all(np.array_equal(value, unit * np.float32(index)) for index, value in enumerate(values))
    cluster_lab.workers[0] = cluster_lab.cluster.worker(f"tiny={tiny('gpt2')}")


def test_a_gateway_that_stops_says_so_and_its_clients_go_on_at_the_other(cluster_lab: Lab) -> None:
    one, other = cluster_lab.hosts
    with proxied(one) as proxy:
        tracer, _, _ = slow(cluster_lab.model(proxy.address), 60, remote=True, blocking=False)
        until(lambda: tracer.job.status == "running")
        cluster_lab.gateways[0].process.send_signal(signal.SIGTERM)
        ready = until(lambda: (answer := cluster_lab.get(one, "/readyz")).status_code == 503 and answer)
        assert ready.json() == {"status": "stopping"}
        assert cluster_lab.get(one, "/v1/me").status_code == 200
        proxy.retarget(other)
        assert cluster_lab.gateways[0].process.wait(90) == 0
        assert len(tracer.job.result(timeout=90)) >= 1
    cluster_lab.gateways[0], cluster_lab.hosts[0] = cluster_lab.cluster.gateway()


def test_without_its_broker_no_gateway_is_ready_and_no_job_is_lost(cluster_lab: Lab) -> None:
    one, other = cluster_lab.hosts
    cluster_lab.valkey.sync()
    tracer, _, _ = slow(cluster_lab.model(one), 40, remote=True, blocking=False)
    until(lambda: tracer.job.status == "running")
    cluster_lab.valkey.kill()
    for host in (one, other):
        until(lambda host=host: cluster_lab.get(host, "/readyz").status_code == 503)  # it is asked once a second
        assert cluster_lab.get(host, "/readyz").json()["status"] == "no broker"
        assert cluster_lab.get(host, "/healthz").status_code == 200
    cluster_lab.valkey.start()
    assert len(tracer.job.result(timeout=90)) >= 1
    until(lambda: all(cluster_lab.get(host, "/readyz").status_code == 200 for host in (one, other)))


def test_nothing_secret_was_said(cluster_lab: Lab) -> None:
    for verb in cluster_lab.cluster.verbs:
        text = verb.said()
        assert "not-to-be-shown" not in text and cluster_lab.cluster.key not in text
        assert "Traceback" not in text, text
