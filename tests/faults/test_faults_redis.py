"""A Redis of an operator's own, by TLS and password, that is killed under load: what was accepted is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import redises
from cluster import Cluster, run_cluster
from interpose.wire.submission import encode_submission
from models import tiny
from redises import OwnRedis
from test_faults_server import forwards, until

pytestmark = pytest.mark.skipif(redises.BINARY is None, reason="no redis-server on this machine")


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    server = OwnRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def own_cluster(own_redis: OwnRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, str]]:
    folder = tmp_path_factory.mktemp("own")
    env = {
        "INTERPOSE_SERVER_REDIS_URL": own_redis.url,
        "INTERPOSE_SERVER_DATA_DIR": str(folder / "data"),
        "INTERPOSE_SERVER_LEASE_S": "4",
    }
    with run_cluster(folder, env) as cluster:
        _, host = cluster.gateway()
        cluster.worker(f"tiny={tiny('gpt2')}")
        yield cluster, host


class Crowd:
    """Hands in jobs one after the other until told to stop. `accepted` are those answered with 202."""

    def __init__(self, client: httpx.Client) -> None:
        self.accepted: list[str] = []
        self.refused = 0
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            job = forwards(3)
            with suppress(httpx.TransportError):
                answer = self._client.post("/v1/jobs", content=encode_submission(job))
                if answer.status_code == 202:
                    self.accepted.append(job.id)
                else:
                    self.refused += 1
                    assert answer.status_code == 503 and "retry-after" in answer.headers, answer.text
            time.sleep(0.02)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def test_no_accepted_job_is_lost_when_redis_is_killed(
    own_cluster: tuple[Cluster, str], own_redis: OwnRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, host = own_cluster
    headers = {"Authorization": f"Bearer {cluster.key}", "Content-Type": "application/msgpack"}
    with httpx.Client(base_url=host, headers=headers, timeout=60, trust_env=False) as client:
        crowd = Crowd(client)
        for away_s in (0.2, 4.5):
            time.sleep(1.5)
            own_redis.kill()
            time.sleep(away_s)
            own_redis.start()
        time.sleep(1)
        crowd.stop()
        states: dict[str, int] = {}
        for job in crowd.accepted:
            state = until(client, job, lambda state: state["status"] in ("completed", "failed"))
            states[state["status"]] = states.get(state["status"], 0) + 1
    with capsys.disabled():
        print(f"\nRedis killed twice: {len(crowd.accepted)} accepted, {states}, {crowd.refused} refused")
    assert states == {"completed": len(crowd.accepted)} and len(crowd.accepted) > 20


def test_the_password_is_nowhere_to_be_seen(own_cluster: tuple[Cluster, str]) -> None:
    cluster, _ = own_cluster
    encoded = cluster.env["INTERPOSE_SERVER_REDIS_URL"].split(":")[2].split("@")[0]
    for verb in cluster.verbs:
        for secret in (redises.PASSWORD, encoded):
            assert secret not in verb.said()
            assert secret not in Path(f"/proc/{verb.process.pid}/cmdline").read_text()
    for wrong in ("rediss://lab:wr@ng/secret@127.0.0.1:1/0", "redis://:secret@127.0.0.1:1", "nothing:secret"):
        verb = cluster.start("gateway", "--port", "0", "--redis-url", wrong)
        assert verb.process.wait(120) == 1
        assert "interpose: " in verb.said() and "secret" not in verb.said() and "Traceback" not in verb.said()
