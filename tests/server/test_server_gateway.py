"""The HTTP interface over a real broker."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
from interpose.graph.footprint import Footprint
from interpose.graph.manifest import fingerprint
from interpose.graph.model import Graph, Node
from interpose.graph.values import TensorSpec
from interpose.wire.submission import encode_submission_json
from interpose.wire.tensors import digest
from interpose_server import blob_keys, metrics, reaching
from interpose_server.broker import keys
from interpose_server.broker.jobs import Outcome, Record, Report
from interpose_server.reaching import FRESH_S
from interpose_server.routes import health
from interpose_server.settings import Settings
from rig import Gateway, Valkey, make_settings, run_gateway, submission, tiny_graph, tiny_manifest
from safetensors.numpy import load as load_safetensors

DATA = np.arange(6, dtype=np.float32).tobytes()
SPEC = TensorSpec((2, 3), "float32")
SHA = digest(SPEC, DATA)
HEADERS = {"Interpose-Dtype": "float32", "Interpose-Shape": "2,3"}


def with_attachment() -> Graph:
    graph = tiny_graph()
    return Graph(graph.runs, (*graph.nodes, Node(2, "attachment", args=(SHA,))), {SHA: SPEC})


async def finish(gateway: Gateway, job: str, saves: list[Record]) -> None:
    """Do what a worker would."""
    ref = keys.ref("ada", job)
    await gateway.broker.queue.claim("tiny", "w1", [ref])
    await gateway.broker.queue.report([Report(ref, "w1", 1, 0, saves, Outcome(None, 0.1))])


def saved(node: int, data: bytes = DATA) -> Record:
    tensors = [{"dtype": "float32", "shape": [2, 3]}]
    body = {"node": node, "tree": {"tensor": 0}, "tensors": tensors, "nbytes": len(data)}
    return Record("save", msgpack.packb(body), data)


async def test_a_job_is_accepted_once(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = submission()
        first, again = await gateway.post(job), await gateway.post(job)
        assert first.status_code == again.status_code == 202
        assert first.json() == {"id": job.id, "status": "queued", "position": 1}
        assert first.headers["interpose-protocol"] == "1"
        assert await gateway.broker.queue.depth("tiny") == 1
        other = await gateway.post(submission(tiny_graph("h.1"), id=job.id))
        assert (other.status_code, other.json()["code"]) == (409, "job_conflict")
        (waiting,) = await gateway.broker.queue.peek("tiny")
        assert waiting.footprint == Footprint(rows=1, longest=3, tokens=3, **_sizes(waiting.footprint))


def _sizes(footprint: Footprint) -> dict[str, int]:
    return {name: getattr(footprint, name) for name in ("result_bytes", "memory_bytes", "flops")}


async def test_json_is_accepted_too(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = submission(with_attachment(), attachments={SHA: DATA})
        headers = {"Content-Type": "application/json; charset=utf-8"}
        answer = await gateway.client.post("/v1/jobs", content=encode_submission_json(job), headers=headers)
        assert answer.status_code == 202, answer.text
        assert (await gateway.client.head(f"/v1/tensors/{SHA}")).status_code == 200


async def test_looking_listing_cancelling(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        jobs = [submission() for _ in range(2)]
        for job in jobs:
            await gateway.post(job)
        state = (await gateway.client.get(f"/v1/jobs/{jobs[1].id}")).json()
        assert (state["status"], state["position"], state["model"]) == ("queued", 2, "tiny")
        assert len((await gateway.client.get("/v1/jobs")).json()["jobs"]) == 2
        gone = await gateway.client.delete(f"/v1/jobs/{jobs[0].id}")
        assert gone.json()["status"] == "cancelled"
        result = await gateway.client.get(f"/v1/jobs/{jobs[0].id}/result")
        assert (result.status_code, result.json()["code"]) == (410, "job_cancelled")


async def test_another_users_job_is_unknown(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = submission()
        await gateway.post(job)
        token, _ = await gateway.broker.accounts.create("bob")
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/result")):
            answer = await gateway.client.request(method, f"/v1/jobs/{job.id}{path}", headers=gateway.auth(token))
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")
        listed = await gateway.client.get("/v1/jobs", headers=gateway.auth(token))
        assert listed.json() == {"jobs": []}


async def test_results_as_files(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = submission()
        await gateway.post(job)
        path = f"/v1/jobs/{job.id}/result"
        assert (await gateway.client.get(path)).status_code == 202
        gateway.blobs.put(blob_keys.result("ada", "big"), [DATA], 60)
        inline = saved(1)
        await finish(gateway, job.id, [inline, Record("save", saved(4).body, blob="big")])
        tensors = load_safetensors((await gateway.client.get(path)).content)
        assert sorted(tensors) == ["1.0", "4.0"]
        assert tensors["4.0"].tobytes() == DATA and tensors["1.0"].shape == (2, 3)
        plain = msgpack.unpackb((await gateway.client.get(path, params={"format": "msgpack"})).content)
        assert plain["id"] == job.id and [save["data"] for save in plain["saves"]] == [DATA, DATA]
        wrong = await gateway.client.get(path, params={"format": "pickle"})
        assert (wrong.status_code, wrong.json()["code"]) == (400, "invalid_payload")


async def test_a_dtype_that_safetensors_lacks_is_refused_there_alone(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        job = submission()
        await gateway.post(job)
        kept = {"node": 1, "tree": {"tensor": 0}, "nbytes": 16}
        kept["tensors"] = [{"dtype": "complex128", "shape": [1]}]
        await finish(gateway, job.id, [Record("save", msgpack.packb(kept), bytes(16))])
        path = f"/v1/jobs/{job.id}/result"
        refused = await gateway.client.get(path)
        assert (refused.status_code, refused.json()["code"]) == (422, "bad_argument")
        plain = msgpack.unpackb((await gateway.client.get(path, params={"format": "msgpack"})).content)
        assert plain["saves"][0]["data"] == bytes(16)


async def test_attachments_are_uploaded_once(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        graph = with_attachment()
        missing = await gateway.post(submission(graph))
        assert (missing.json()["code"], missing.json()["details"]) == ("missing_attachment", {"missing": [SHA]})
        path = f"/v1/tensors/{SHA}"
        assert (await gateway.client.head(path)).status_code == 404
        assert (await gateway.client.put(path, content=DATA, headers=HEADERS)).status_code == 201
        assert (await gateway.client.put(path, content=DATA, headers=HEADERS)).status_code == 200
        assert (await gateway.client.head(path)).status_code == 200
        assert (await gateway.post(submission(graph))).status_code == 202
        token, _ = await gateway.broker.accounts.create("bob")
        assert (await gateway.client.head(path, headers=gateway.auth(token))).status_code == 404


async def test_manifests_are_cached_by_fingerprint(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        answer = await gateway.client.get("/v1/models/tiny", headers={"Accept": "application/msgpack"})
        mark = answer.headers["etag"]
        assert mark == f'"{fingerprint(tiny_manifest())}"' and msgpack.unpackb(answer.content)["model"] == "tiny"
        again = await gateway.client.get("/v1/models/tiny", headers={"If-None-Match": mark})
        assert (again.status_code, again.content) == (304, b"")
        assert (await gateway.client.get("/v1/models/tiny")).json()["blocks"] == ["h.0", "h.1"]
        (listed,) = (await gateway.client.get("/v1/models")).json()["models"]
        assert listed["id"] == "tiny" and listed["state"] == "ready"


async def test_tokenizers_are_handed_out(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        assert (await gateway.client.get("/v1/models/tiny/tokenizer")).status_code == 404
        sha = hashlib.sha256(b"{}").hexdigest()
        gateway.blobs.put(blob_keys.tokenizer(sha), [b"{}"], 60)
        await gateway.broker.models.publish("org/name", "w2", tiny_manifest("org/name"), sha)
        answer = await gateway.client.get("/v1/models/org/name/tokenizer")
        assert (answer.status_code, answer.content) == (200, b"{}")


async def test_keys_over_http_are_for_admins(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        assert (await gateway.client.get("/v1/admin/keys")).json()["code"] == "forbidden"
        admin, _ = await gateway.broker.accounts.create("root", admin=True)
        auth = gateway.auth(admin) | {"Content-Type": "application/json"}
        wanted = {"user": "eve", "models": ["tiny"]}
        made = (await gateway.client.post("/v1/admin/keys", json=wanted, headers=auth)).json()
        eve = gateway.auth(made["token"])
        assert (await gateway.client.get("/v1/me", headers=eve)).json()["user"] == "eve"
        listed = (await gateway.client.get("/v1/admin/keys", headers=auth)).text
        assert made["id"] in listed and made["token"] not in listed
        gone = await gateway.client.delete(f"/v1/admin/keys/{made['id']}", headers=auth)
        assert gone.status_code == 204
        assert (await gateway.client.get("/v1/me", headers=eve)).status_code == 401


async def test_a_key_for_some_models(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        token, _ = await gateway.broker.accounts.create("eve", models=("other",))
        auth = gateway.auth(token)
        assert (await gateway.post(submission(), headers=auth)).json()["code"] == "forbidden"
        assert (await gateway.client.get("/v1/models/tiny", headers=auth)).status_code == 403
        assert (await gateway.client.get("/v1/models", headers=auth)).json() == {"models": []}


async def test_no_answer_names_a_model_that_the_key_is_not_for(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        await gateway.broker.models.publish("secret", "w2", tiny_manifest("secret"), "")
        everyone = await gateway.client.get("/v1/models/wrong")
        assert (everyone.status_code, "there is secret, tiny" in everyone.json()["detail"]) == (404, True)
        assert "secret" in (await gateway.client.get("/")).text
        token, _ = await gateway.broker.accounts.create("eve", models=("tiny", "gone"))
        auth = gateway.auth(token)
        known = submission(model="secret")
        answers = [
            *[await gateway.client.get(path, headers=auth) for path in ("/v1/models", "/v1/me", "/v1/models/tiny")],
            *[await gateway.client.get(f"/v1/models/{name}", headers=auth) for name in ("gone", "wrong")],
            *[await gateway.client.get(f"/v1/models/{name}/tokenizer", headers=auth) for name in ("gone", "tiny")],
            *[await gateway.post(submission(model=name), headers=auth) for name in ("gone", "wrong")],
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 403, 404, 404, 404, 403]
        assert all("secret" not in answer.text for answer in answers)
        assert "there is tiny" in answers[3].json()["detail"]
        refused = [await gateway.client.get(f"/v1/models/{name}", headers=auth) for name in ("secret", "secreu")]
        refused += [await gateway.post(known, headers=auth)]
        assert [answer.json()["code"] for answer in refused] == ["forbidden"] * 3
        await asyncio.sleep(FRESH_S + 0.1)
        page = (await gateway.client.get("/", headers={"Authorization": ""})).text
        assert "secret" not in page and "2, of which 2 run jobs" in page, "some keys are for some models only"


async def test_who_has_no_key_cannot_have_the_broker_asked_over_and_over(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        redis, asked = gateway.broker.redis, 0
        for path in ("/readyz", "/") * 20:
            assert (await gateway.client.get(path, headers={"Authorization": ""})).status_code == 200
        before = (await redis.info("stats"))["total_commands_processed"]
        await asyncio.gather(*(gateway.client.get("/readyz", headers={"Authorization": ""}) for _ in range(200)))
        asked = (await redis.info("stats"))["total_commands_processed"] - before
        assert asked < 100, "once a second, and what the sweeper asks"


async def test_a_full_queue_says_when_to_come_back(valkey: Valkey, tmp_path: Path) -> None:
    async with run_gateway(make_settings(valkey, tmp_path, queued_per_user=1)) as gateway:
        assert (await gateway.post(submission())).status_code == 202
        full = await gateway.post(submission())
        assert (full.status_code, full.json()["code"], full.headers["retry-after"]) == (429, "queue_full", "1")


async def test_too_many_requests(valkey: Valkey, tmp_path: Path) -> None:
    async with run_gateway(make_settings(valkey, tmp_path, rate_per_s=0.001, rate_burst=2)) as gateway:
        codes = [(await gateway.client.get("/v1/me")).status_code for _ in range(3)]
        assert codes == [200, 200, 429]


async def test_a_full_store_refuses_the_upload_and_recovers(valkey: Valkey, tmp_path: Path) -> None:
    settings = make_settings(valkey, tmp_path, blob_bytes=4096)
    async with run_gateway(settings) as gateway:
        gateway.blobs.put(blob_keys.result("bob", "x"), [b"x"], 60)
        put = await gateway.client.put(f"/v1/tensors/{SHA}", content=DATA, headers=HEADERS)
        assert (put.status_code, put.json()["code"]) == (507, "storage_full")
        for file in settings.blob_dir.rglob("*"):
            if file.is_file() and file.stat().st_mtime > time.time():
                os.utime(file, (0, 0))  # its time is over
        gateway.blobs.sweep()
        put = await gateway.client.put(f"/v1/tensors/{SHA}", content=DATA, headers=HEADERS)
        assert put.status_code == 201


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/docs", "/openapi.json"])
async def test_open_pages(settings: Settings, path: str) -> None:
    async with run_gateway(settings) as gateway:
        answer = await gateway.client.get(path, headers={"Authorization": ""})
        assert answer.status_code == 200


async def test_an_entry_of_another_version_keeps_jobs_from_no_other_model(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        entry = {"spec": {"name": "newer", "unheard_of": 1}, "removed": False}
        await gateway.broker.redis.hset(keys.SPECS, "newer", json.dumps(entry))
        await gateway.broker.redis.sadd(keys.MODELS, "newer")
        for path in ("/", "/readyz"):
            assert (await gateway.client.get(path, headers={"Authorization": ""})).status_code == 200
        assert (await gateway.post(submission())).status_code == 202


async def test_figures_need_an_admin(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        await gateway.post(submission())
        assert (await gateway.client.get("/metrics")).status_code == 403
        admin, _ = await gateway.broker.accounts.create("root", admin=True)
        text = (await gateway.client.get("/metrics", headers=gateway.auth(admin))).text
        assert 'interpose_waiting{model="tiny"} 1.0' in text and "/v1/jobs" in text
        assert 'interpose_tokens_total{model="tiny"}' in text
        await gateway.broker.models.forget("tiny")
        text = (await gateway.client.get("/metrics", headers=gateway.auth(admin))).text
        assert "interpose_waiting{" not in text, "of a model that is gone"


async def test_what_a_gateway_says_of_itself_behind_a_broker_that_hangs(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (health, metrics, reaching):
        monkeypatch.setattr(module, "ANSWERS_S", 0.2)
    async with run_gateway(make_settings(valkey, tmp_path, metrics_open=True)) as gateway:
        await gateway.post(submission())
        figures = (await gateway.client.get("/metrics")).text
        assert "interpose_broker_up 1.0" in figures and "interpose_waiting{" in figures
        await asyncio.sleep(FRESH_S)
        with valkey.hanging():
            # What is asked once is answered for all, however many they are.
            async with asyncio.timeout(5):
                found = await asyncio.gather(*(gateway.client.get("/metrics") for _ in range(40)))
                ready = await gateway.client.get("/readyz")
        for answer in found:
            assert answer.status_code == 200
            assert "interpose_broker_up 0.0" in answer.text and "interpose_waiting{" not in answer.text
            assert "interpose_storage_up 1.0" in answer.text and "interpose_requests_total{" in answer.text
        assert (ready.status_code, ready.json()["status"]) == (503, "no broker")
        await asyncio.sleep(FRESH_S)
        assert 'interpose_waiting{model="tiny"} 1.0' in (await gateway.client.get("/metrics")).text


async def test_figures_for_keys_that_a_broker_which_hangs_holds(
    valkey: Valkey, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "ANSWERS_S", 0.2)
    async with run_gateway(settings) as gateway:
        with valkey.hanging():
            async with asyncio.timeout(5):
                answer = await gateway.client.get("/metrics")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_the_process_asks_for_all_the_files_it_may_have() -> None:
    code = (
        "import resource as r; from interpose_server.gateway import allow_many_files as allow\n"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (256, hard)); allow()\n"
        "print(*r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    soft, hard = map(int, done.stdout.split())
    assert soft > 256 and (soft, hard) == (min(1 << 16, hard) if hard > 0 else 1 << 16, hard)
