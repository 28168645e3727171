"""`interpose gateway` by itself: behind TLS, and what it refuses."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from certificates import Certificate, certificate
from cluster import Cluster, run_cluster
from rig import Valkey


@pytest.fixture
def made(tmp_path: Path) -> Certificate:
    return certificate(tmp_path)


@pytest.fixture
def alone(valkey: Valkey, tmp_path: Path) -> Iterator[Cluster]:
    env = {"INTERPOSE_SERVER_REDIS_URL": valkey.url, "INTERPOSE_SERVER_DATA_DIR": str(tmp_path / "data")}
    with run_cluster(tmp_path, env) as cluster:
        yield cluster


def test_by_tls_with_a_certificate_of_ones_own(alone: Cluster, made: Certificate) -> None:
    verb, address = alone.gateway("--tls-cert", made.file, "--tls-key", made.key)
    assert address.startswith("https://")
    trusted = ssl.create_default_context(cafile=made.file)
    with httpx.Client(base_url=address, verify=trusted, trust_env=False, timeout=60) as client:
        answer = client.get("/v1/me", headers={"Authorization": f"Bearer {alone.key}"})
        assert (answer.status_code, answer.json()["user"]) == (200, "ada")
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "no model ready")
    with pytest.raises(httpx.TransportError):
        httpx.get(address.replace("https", "http"), trust_env=False, timeout=60)
    assert verb.stop() == 0 and "Traceback" not in verb.said()


def test_what_it_refuses(alone: Cluster, made: Certificate, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other")
    refused = [
        alone.start("gateway", "--port", "0", "--tls-cert", made.file, "--tls-key", other.key),
        alone.start("gateway", "--port", "0", "--tls-key", made.key),
        alone.start("gateway", "--port", "0", "--redis-url", "redis://127.0.0.1:1/0"),
    ]
    for verb, told in zip(refused, ("certificate", "--tls-cert", "Redis can't be used"), strict=True):
        assert verb.process.wait(60) == 1
        assert told in verb.said() and "Traceback" not in verb.said()
