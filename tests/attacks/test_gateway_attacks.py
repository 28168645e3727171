"""What strangers may send to the gateway, and what it says to them."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from interpose.errors import BY_CODE
from interpose.graph.limits import Limits
from interpose.graph.model import Graph, Node
from interpose.wire.submission import encode_submission
from rig import Gateway, Valkey, make_settings, run_gateway, run_valkey, submission, tiny_graph


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    yield from run_valkey()


@pytest.fixture
async def gateway(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Gateway]:
    valkey.clear()
    settings = make_settings(valkey, tmp_path, limits=Limits(payload_bytes=100_000, nodes=50))
    async with run_gateway(settings) as gateway:
        yield gateway
        # Whatever came before, the next job is taken.
        assert (await gateway.post(submission())).status_code == 202


def refused(answer: httpx.Response, code: str, status: int) -> None:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    assert (body["code"], body["status"], answer.status_code) == (code, status, status), body
    assert body["code"] in BY_CODE and body["title"] and body["detail"] == body["message"]
    assert not any(word in answer.text for word in ("Traceback", 'File "', "site-packages", str(Path.cwd())))


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer x", "Bearer ip_" + "a" * 43, "Basic YTpi", "Bearer ip_" + "a" * 9999]
)
async def test_wrong_keys(gateway: Gateway, header: str) -> None:
    answer = await gateway.client.get("/v1/me", headers={"Authorization": header})
    refused(answer, "unauthorized", 401)
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_revoked_key(gateway: Gateway) -> None:
    token, key = await gateway.broker.accounts.create("eve")
    await gateway.broker.accounts.revoke(key.id)
    refused(await gateway.client.get("/v1/me", headers=gateway.auth(token)), "unauthorized", 401)


async def test_tokens_are_nowhere_in_the_broker(gateway: Gateway) -> None:
    stored = await gateway.broker.redis.hgetall("ip:keys")
    assert stored and not any(gateway.token.encode() in raw for raw in (*stored, *stored.values()))


async def test_truncated_payloads(gateway: Gateway) -> None:
    body = encode_submission(submission())
    for end in range(0, len(body), 7):
        answer = await gateway.client.post("/v1/jobs", content=body[:end])
        assert answer.status_code in (400, 422), end
    refused(await gateway.client.post("/v1/jobs", content=b""), "invalid_payload", 400)


async def test_random_payloads(gateway: Gateway) -> None:
    for size in (1, 10, 1000, 99_000):
        refused(await gateway.client.post("/v1/jobs", content=os.urandom(size) + b"\xc1"), "invalid_payload", 400)


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-python-pickle"])
async def test_wrong_content_types(gateway: Gateway, kind: str) -> None:
    body = encode_submission(submission())
    answer = await gateway.client.post("/v1/jobs", content=body, headers={"Content-Type": kind})
    refused(answer, "invalid_payload", 400)


async def test_an_oversize_body_is_refused_before_it_is_read(gateway: Gateway) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 10_000_000:
            sent += 10_000
            yield bytes(10_000)

    refused(await gateway.client.post("/v1/jobs", content=endless()), "limit_exceeded", 413)
    assert sent <= 120_000
    announced = await gateway.client.post("/v1/jobs", content=b"x", headers={"Content-Length": str(10**12)})
    refused(announced, "limit_exceeded", 413)


async def test_ten_times_the_nodes(gateway: Gateway) -> None:
    first = tiny_graph()
    nodes = first.nodes + tuple(Node(index, "tell", args=("x",)) for index in range(2, 500))
    refused(await gateway.post(submission(Graph(first.runs, nodes))), "limit_exceeded", 413)


async def test_unknown_models_and_modules(gateway: Gateway) -> None:
    refused(await gateway.post(submission(model="other")), "unknown_model", 404)
    refused(await gateway.post(submission(model="../../x")), "unknown_model", 404)
    refused(await gateway.post(submission(revision="r0")), "model_updated", 409)
    answer = await gateway.post(submission(tiny_graph("h.9")))
    refused(answer, "unknown_module", 422)
    assert "h has 0, 1" in answer.json()["message"] and answer.json()["node"] == 0


@pytest.mark.parametrize("op", ["__class__", "exec", "getattr", "os.system", "torch.load", "from_file"])
async def test_ops_outside_the_table(gateway: Gateway, op: str) -> None:
    graph = tiny_graph()
    refused(await gateway.post(submission(Graph(graph.runs, (Node(0, op),)))), "unknown_op", 422)


@pytest.mark.parametrize("stated", ["2", "0", "x" * 500, ""])
async def test_other_protocols(gateway: Gateway, stated: str) -> None:
    refused(await gateway.client.get("/v1/me", headers={"Interpose-Protocol": stated}), "version_mismatch", 426)


async def test_paths_and_methods_that_are_not_there(gateway: Gateway) -> None:
    refused(await gateway.client.get("/v1/nothing"), "not_found", 404)
    refused(await gateway.client.get("/v1/jobs/../../etc/passwd"), "not_found", 404)
    refused(await gateway.client.put("/v1/jobs"), "request", 405)
    refused(await gateway.client.get("/v1/jobs/NOT-A-JOB"), "invalid_payload", 400)
    refused(await gateway.client.get("/v1/jobs/" + "0" * 32), "unknown_job", 404)


async def test_uploads_that_lie(gateway: Gateway) -> None:
    headers = {"Interpose-Dtype": "float32", "Interpose-Shape": "2"}
    path = "/v1/tensors/" + "0" * 64
    for content in (b"", b"1234567", b"12345678", b"123456789"):
        answer = await gateway.client.put(path, content=content, headers=headers)
        assert answer.json()["code"] in ("invalid_payload", "limit_exceeded")
    bad = headers | {"Interpose-Shape": "-1"}
    refused(await gateway.client.put(path, content=b"", headers=bad), "invalid_payload", 400)
    huge = headers | {"Interpose-Shape": "1000000000"}
    refused(await gateway.client.put(path, content=b"", headers=huge), "limit_exceeded", 413)
    bools = {"Interpose-Dtype": "bool", "Interpose-Shape": "2"}
    refused(await gateway.client.put(path, content=b"\x00\x02", headers=bools), "invalid_payload", 400)
    refused(await gateway.client.put("/v1/tensors/abc", content=b"", headers=headers), "invalid_payload", 400)
    assert (await gateway.client.head(path)).status_code == 404
    assert gateway.blobs.used() == 0


async def test_a_failure_of_ours_shows_nothing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret /path")

    with monkeypatch.context() as patch:
        patch.setattr(type(gateway.broker.queue), "list", broken)
        answer = await gateway.client.get("/v1/jobs")
    refused(answer, "internal_error", 500)
    assert "secret" not in answer.text


async def test_admin_bodies(gateway: Gateway) -> None:
    token, _ = await gateway.broker.accounts.create("root", admin=True)
    headers = gateway.auth(token) | {"Content-Type": "application/json"}
    for body in (
        {},
        {"user": "a b"},
        {"user": "x" * 65},
        {"user": "a", "sudo": 1},
        {"user": "a", "models": ["../x"]},
    ):
        answer = await gateway.client.post("/v1/admin/keys", content=json.dumps(body), headers=headers)
        refused(answer, "invalid_payload", 400)
