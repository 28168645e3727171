"""Parts of a real server die while a job runs: the job still ends, once, and the next one runs."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.wire.submission import Submission, encode_submission
from models import tiny
from safetensors.torch import load
from serving import Served, parts, serve

SETTINGS = {"INTERPOSE_SERVER_LEASE_S": "8", "INTERPOSE_SERVER_MAX_ATTEMPTS": "2"}
SYNCED = {"INTERPOSE_SERVER_VALKEY_FSYNC": "always"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("faults")
    with serve(f"tiny={tiny('gpt2')}", data_dir=folder / "data", env=SETTINGS | SYNCED) as served:
        yield served


@pytest.fixture
def client(lab: Served) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {lab.key}", "Content-Type": "application/msgpack"}
    transport = httpx.HTTPTransport(retries=20)
    with httpx.Client(base_url=lab.host, headers=headers, transport=transport, timeout=60) as client:
        yield client


def forwards(count: int) -> Submission:
    """A job of so many forwards, each of which saves a block's output."""
    nodes: list[Node] = []
    for run in range(count):
        nodes.append(Node(2 * run, "read", point=Point("transformer.h.2", "output"), invoke=0, run=run))
        nodes.append(Node(2 * run + 1, "save", args=(Ref(2 * run),), invoke=0, run=run))
    runs = tuple(Run("trace", (Invoke((tuple(range(1, 100)),)),)) for _ in range(count))
    return Submission(uuid.uuid4().hex, "tiny", Graph(runs, tuple(nodes)))


def start(client: httpx.Client, job: Submission, attempt: int) -> None:
    """Return once the job runs for the n-th time."""
    if attempt == 1:
        client.post("/v1/jobs", content=encode_submission(job)).raise_for_status()
    until(client, job, lambda state: state["status"] == "running" and state["attempt"] == attempt)


def until(client: httpx.Client, job: Submission | str, ready: Any, timeout_s: float = 120) -> dict[str, Any]:
    name = job if isinstance(job, str) else job.id
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        # The gateway itself may be the part that was killed.
        with suppress(httpx.TransportError):
            state: dict[str, Any] = client.get(f"/v1/jobs/{name}").json()
            if "attempt" in state and ready(state):
                return state
        time.sleep(0.02)
    raise TimeoutError


def finish(client: httpx.Client, job: Submission) -> dict[str, Any]:
    return until(client, job, lambda state: state["status"] in ("completed", "failed"))


def kill(lab: Served, part: str) -> None:
    for process in parts(lab, part):
        process.kill()


def test_a_killed_worker_costs_time_only(lab: Served, client: httpx.Client) -> None:
    job = forwards(400)
    start(client, job, 1)
    kill(lab, "worker")
    state = finish(client, job)
    assert (state["status"], state["attempt"]) == ("completed", 2)
    tensors = load(client.get(f"/v1/jobs/{job.id}/result").content)
    assert len(tensors) == 400 and tensors["1.0"].equal(tensors["799.0"])


def test_a_job_that_kills_its_worker_is_given_up(lab: Served, client: httpx.Client) -> None:
    job, other = forwards(800), forwards(1)
    for attempt in (1, 2):
        start(client, job, attempt)
        kill(lab, "worker")
    state = finish(client, job)
    assert (state["status"], state["error"]["code"]) == ("failed", "job_poisoned")
    client.post("/v1/jobs", content=encode_submission(other)).raise_for_status()
    assert finish(client, other)["status"] == "completed"


@pytest.mark.parametrize("part", ["valkey", "gateway"])
def test_a_killed_part_costs_the_running_job_nothing(lab: Served, client: httpx.Client, part: str) -> None:
    job = forwards(400)
    start(client, job, 1)
    kill(lab, part)
    state = finish(client, job)
    assert (state["status"], state["attempt"]) == ("completed", 1)
    assert len(load(client.get(f"/v1/jobs/{job.id}/result").content)) == 400


def test_an_accepted_job_outlives_a_broker_killed_right_after(lab: Served, client: httpx.Client) -> None:
    told = json.loads((lab.data_dir / "server.json").read_text())["redis_url"]
    for _ in range(5):
        with redis.Redis.from_url(told) as broker:
            assert broker.config_get("appendfsync") == {"appendfsync": "always"}
        job = forwards(3)
        client.post("/v1/jobs", content=encode_submission(job)).raise_for_status()
        kill(lab, "valkey")
        assert finish(client, job)["status"] == "completed"


def test_queued_jobs_outlive_the_whole_server(tmp_path: Path) -> None:
    job = forwards(200)
    options = {"data_dir": tmp_path / "data", "env": SETTINGS}
    with serve(f"tiny={tiny('gpt2')}", **options) as lab:  # type: ignore[arg-type]
        auth = {"Authorization": f"Bearer {lab.key}", "Content-Type": "application/msgpack"}
        body = encode_submission(job)
        httpx.post(
            f"{lab.host}/v1/jobs", content=body, headers=auth, trust_env=False, timeout=60
        ).raise_for_status()
        lab.process.kill()
        lab.process.wait()
    with serve(f"tiny={tiny('gpt2')}", **options) as again:  # type: ignore[arg-type]
        assert again.key == lab.key
        with httpx.Client(base_url=again.host, headers=auth, trust_env=False, timeout=60) as client:
            assert finish(client, job)["status"] == "completed"


def test_a_killed_worker_costs_those_that_were_next_time_only(lab: Served, client: httpx.Client) -> None:
    """Some are on the engine, some claimed to be next, some wait."""
    jobs = [forwards(60 if index % 4 == 0 else 2) for index in range(24)]
    for job in jobs:
        client.post("/v1/jobs", content=encode_submission(job)).raise_for_status()
    until(client, jobs[0], lambda state: state["status"] != "queued")
    kill(lab, "worker")
    for job in jobs:
        state = finish(client, job)
        assert (state["status"], state["attempt"] <= 2) == ("completed", True)


def test_what_a_stopped_server_had_claimed_waits_for_the_next(tmp_path: Path) -> None:
    options = {"data_dir": tmp_path / "data", "env": {**SETTINGS, "INTERPOSE_SERVER_MAX_ATTEMPTS": "1"}}
    jobs = [forwards(100 if index < 2 else 1) for index in range(30)]
    with serve(f"tiny={tiny('gpt2')}", **options) as lab:  # type: ignore[arg-type]
        auth = {"Authorization": f"Bearer {lab.key}", "Content-Type": "application/msgpack"}
        with httpx.Client(base_url=lab.host, headers=auth, trust_env=False, timeout=60) as client:
            for job in jobs:
                client.post("/v1/jobs", content=encode_submission(job)).raise_for_status()
    with (
        serve(f"tiny={tiny('gpt2')}", **options) as again,  # type: ignore[arg-type]
        httpx.Client(base_url=again.host, headers=auth, trust_env=False, timeout=60) as client,
    ):
        assert {finish(client, job)["status"] for job in jobs} == {"completed"}
