"""The catalogue over HTTP and by the command line: the same verbs, for admins alone."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pytest
from interpose.cli.main import app
from interpose.errors import ModelUnavailable
from interpose_server.broker.connect import Broker, connect
from interpose_server.broker.states import ModelState
from interpose_server.models.inventory import HeldBack, Inventory, Node
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings
from rig import Gateway, Valkey, make_settings, new_job, run_gateway, submission, tiny_manifest
from typer.testing import CliRunner, Result

T = TypeVar("T")

WHOLE = {
    "name": "org/big",
    "source": "/models/big",
    "devices": 2,
    "replicas": {"min": 0, "max": 3},
    "schedule": ["mon-fri 08:00-20:00"],
    "settings": {"batch_s": 5},
}


async def asked(gateway: Gateway, method: str, path: str = "", **rest: Any) -> tuple[int, Any]:
    token, _ = await gateway.broker.accounts.create("root", admin=True)
    headers = gateway.auth(token) | {"Content-Type": "application/json"}
    answer = await gateway.client.request(method, f"/v1/admin/models{path}", headers=headers, **rest)
    return answer.status_code, answer.json()


async def test_the_catalogue_is_for_admins(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        for method, path in (("GET", ""), ("PUT", ""), ("DELETE", "/tiny"), ("POST", "/tiny/load")):
            answer = await gateway.client.request(method, f"/v1/admin/models{path}", json=WHOLE)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, path)
        assert await gateway.broker.specs.list() == []


async def test_a_models_life_over_http(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        assert (await asked(gateway, "PUT", json=WHOLE))[0] == 201
        assert (await asked(gateway, "PUT", json=WHOLE))[0] == 200
        status, listed = await asked(gateway, "GET")
        big = {model["id"]: model for model in listed["models"]}["org/big"]
        assert status == 200 and big["state"] == "cold" and not listed["kept"] and listed["devices"] is None
        assert big["spec"]["source"] == "/models/big" and big["waiting"] == 0
        for verb, field in (("load", "wished"), ("pin", "pinned")):
            assert (await asked(gateway, "POST", f"/org/big/{verb}"))[0] == 202
            (big,) = [model for model in (await asked(gateway, "GET"))[1]["models"] if model["id"] == "org/big"]
            assert big[field]
        status, problem = await asked(gateway, "POST", "/org/big/evict")
        assert (status, problem["code"]) == (400, "config") and "unpin" in problem["detail"]
        assert (await asked(gateway, "POST", "/org/big/unpin"))[0] == 202
        assert (await asked(gateway, "POST", "/org/big/evict"))[0] == 202
        assert (await asked(gateway, "DELETE", "/org/big"))[1] == {"id": "org/big", "ended": 0}
        assert (await asked(gateway, "DELETE", "/org/big"))[0] == 404


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "../up"}, "model's name"),
        ({"colour": "red"}, "colour: there is no such key here; there are name, source, "),
        ({"device": 2}, "device: there is no such key here; did you mean devices?"),
        ({"replicas": {"min": 4, "max": 1}}, "can't both be"),
        ({"schedule": ["always"]}, "no time of the week"),
        ({"settings": {"redis_url": "redis://elsewhere"}}, "setting redis_url: can't differ from model to model"),
        ({"settings": {"limits": {"nodes": "many"}}}, "the limit nodes is a number"),
        ({"settings": {"batch_s": math.inf}}, "JSON can't say"),
        ({"resources": {"GPU": 1}}, "resources.GPU: is no resource of your own"),
        ({"source": "\ud800"}, "JSON can't say"),
        ({"idle_s": math.inf}, "idle_s: has to be a finite number"),
        ({"devices": math.inf}, "devices: has to be a finite number"),
        ({"placement": "block"}, "placement: has to be one of auto, device, devices, blocks, not 'block'; did you"),
    ],
)
async def test_wrong_entries_are_refused(settings: Settings, changes: dict[str, Any], words: str) -> None:
    async with run_gateway(settings) as gateway:
        status, problem = await asked(gateway, "PUT", content=json.dumps({**WHOLE, **changes}))
        assert status == 400 and words in problem["detail"]
        assert await gateway.broker.specs.list() == []


async def test_removing_at_once_ends_those_who_wait(settings: Settings) -> None:
    async with run_gateway(settings) as gateway:
        await gateway.broker.specs.put(ModelSpec(name="tiny"))
        job = submission()
        await gateway.post(job)
        assert (await asked(gateway, "DELETE", "/tiny?now=true"))[1] == {"id": "tiny", "ended": 1}
        told = (await gateway.client.get(f"/v1/jobs/{job.id}")).json()["error"]
        assert told["code"] == "model_unavailable" and "out of service" in told["message"]


# -- the command line ------------------------------------------------------------------------------------------


class Lab:
    """A broker, and the command line that is pointed at it."""

    def __init__(self, valkey: Valkey, folder: Path) -> None:
        self.settings = make_settings(valkey, folder)

    def run(self, *words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--redis-url", self.settings.redis_url])

    def models(self, *words: str) -> str:
        done = self.run("models", *words)
        assert done.exit_code == 0, done.output
        return done.stdout + done.stderr

    def do(self, work: Any) -> Any:
        async def run() -> Any:
            broker = connect(self.settings)
            try:
                return await work(broker)
            finally:
                await broker.close()

        return asyncio.run(run())


@pytest.fixture
def lab(valkey: Valkey, tmp_path: Path) -> Lab:
    return Lab(valkey, tmp_path)


def test_adding_and_listing(lab: Lab) -> None:
    assert "there are no models" in lab.models("list")
    words = ["--source", "/models/big", "--devices", "2", "--max", "3", "--idle-s", "60", "--adapter", "nice=/lora"]
    told = lab.models("add", "org/big", *words, "--schedule", "mon-fri 08:00-20:00")
    assert told == "org/big is in the catalogue\n"
    assert lab.models("add", "org/big", "--min", "2") == "org/big is replaced\n"
    (spec,) = lab.do(lambda broker: broker.specs.list())
    assert (spec.replicas.min, spec.replicas.max, spec.source) == (2, 2, "")
    told = lab.models("list")
    assert "org/big  cold  0 copies  0 waiting  0 running\n" in told and "nothing loads them" in told
    (listed,) = json.loads(lab.run("models", "list", "--json").stdout)["models"]
    assert listed["spec"] == {"name": "org/big", "replicas": {"min": 2, "max": 2}}


def test_devices_and_who_holds_them_are_shown(lab: Lab) -> None:
    names = [f"gpu-a#{'0' * 32}", f"gpu-b#{'1' * 32}"]
    shown = Inventory(
        kind="GPU",
        nodes=[Node("gpu-a", 4.0, 1.75), Node("gpu-b", 2.0, 1.0)],
        takes={"tiny": [0.25], "org/big": [1.0, 1.0, 1.0]},
        holds={names[0]: [("gpu-a", 0.25)], names[1]: [("gpu-a", 1.0), ("gpu-a", 1.0), ("gpu-b", 1.0)]},
        pending={"tiny": 1},
        held_back={"org/big": HeldBack("too_large", "a copy takes 8 GPUs; the cluster has 6 GPUs", served=True)},
    )

    async def run(broker: Broker) -> None:
        for model, worker in zip(("tiny", "org/big"), names, strict=True):
            await broker.specs.put(ModelSpec(name=model))
            await broker.models.announce(model, worker, ModelState.LOADING)
        await broker.specs.show(shown)

    lab.do(run)
    assert lab.models("list").splitlines()[:12] == [
        "2.75 of 6 GPUs free, 2 nodes",
        "    gpu-a: 1.75 of 4 free",
        "    gpu-b: 1 of 2 free",
        "org/big  loading  0 copies  0 waiting  0 running",
        "    a copy takes 3 parts of 1 GPU",
        "    copy 11111111: 2 GPUs of gpu-a, 1 GPU of gpu-b",
        "    its entry can't be (too_large): a copy takes 8 GPUs; the cluster has 6 GPUs",
        "    the version before is served until it can, or until the entry is another",
        "tiny  loading  0 copies  0 waiting  0 running",
        "    a copy takes 0.25 of a GPU",
        "    copy 00000000: 0.25 of a GPU of gpu-a",
        "    1 more to come: there is no room yet, or it is being started",
    ]
    told = json.loads(lab.run("models", "list", "--json").stdout)
    assert (told["devices"]["total"], told["devices"]["free"], len(told["devices"]["nodes"])) == (6, 2.75, 2)
    assert [model["held_back"] for model in told["models"]] == [asdict(shown.held_back["org/big"]), None]
    assert told["models"][1]["holds"] == [{"worker": names[0], "node": "gpu-a", "devices": 0.25}]


def test_folders_are_named_from_here(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lab.models("add", "near", "--source", "./weights", "--adapter", "fr=./lora")
    spec = lab.do(lambda broker: broker.specs.get("near"))
    assert (spec.source, spec.adapters) == (str(tmp_path / "weights"), {"fr": str(tmp_path / "lora")})


def test_entries_from_a_file(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    for text in ("- name: a\n- name: b\n  pinned: true\n", "models:\n  - name: a\n  - name: b\n", "name: a\n"):
        file.write_text(text)
        assert "a is" in lab.models("add", "--file", str(file))
    assert [spec.name for spec in lab.do(lambda broker: broker.specs.list())] == ["a", "b"]
    file.write_text("- name: a\n- name: b\n  colour: red\n")
    done = lab.run("models", "add", "--file", str(file))
    assert done.exit_code == 1 and f"{file}:3: 1.colour: there is no such key here" in done.stderr


@pytest.mark.parametrize(
    "words, told",
    [
        (["add"], "give a name with its options, or --file"),
        (["add", "--source", "x"], "give the model a name"),
        (["add", "x", "--schedule", "daily"], "no time of the week"),
        (["add", "x", "--adapter", "nice"], "an adapter is NAME=SOURCE"),
        (["add", "x", "--adapter", "a=./b", "--adapter", "a=./c"], "there is an adapter 'a' already"),
        (["add", "x", "--min", "3", "--max", "1"], "can't both be"),
        (
            ["add", "x", "--placement", "block"],
            "placement: has to be one of auto, device, devices, blocks, not 'block'",
        ),
        (["add", "x", "--devices", "-1"], "devices: has to be at least 0, not -1.0"),
        (["load", "x"], "no model 'x' is in the catalogue; there is none"),
        (["pin", "x"], "no model 'x'"),
        (["remove", "x"], "no model 'x'"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(lab: Lab, words: list[str], told: str) -> None:
    done = lab.run("models", *words)
    assert done.exit_code == 1 and told in done.stderr and "Traceback" not in done.output


def test_verbs(lab: Lab) -> None:
    lab.models("add", "tiny")
    assert "stays" in lab.models("pin", "tiny") and "pinned" in lab.models("list")
    assert "may be let go" in lab.models("unpin", "tiny") and "pinned" not in lab.models("list")
    assert "is to be loaded" in lab.models("load", "tiny")
    assert "as soon as it has no work" in lab.models("evict", "tiny")
    lab.do(lambda broker: broker.queue.submit(new_job()))
    assert "1 jobs that waited for it have ended" in lab.models("remove", "tiny", "--now")
    assert "tiny  draining  0 copies  0 waiting  0 running  removed" in lab.models("list")


def test_loading_waits_for_the_model_or_for_the_reason(lab: Lab) -> None:
    lab.models("add", "tiny")
    lab.do(lambda broker: broker.models.publish("tiny", "w1", tiny_manifest(), ""))
    assert lab.models("load", "tiny", "--wait") == "tiny is ready\n"
    lab.models("add", "gated")

    async def fail(broker: Broker) -> None:
        why = ModelUnavailable("org/gated: 403 Forbidden", details={"reason": "gated"})
        while not (await broker.models.get("gated")).wished:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await broker.models.announce("gated", "w1", ModelState.FAILED, why)

    async def both(broker: Broker) -> Result:
        waited: Coroutine[Any, Any, Result] = asyncio.to_thread(lab.run, "models", "load", "gated", "--wait")
        return (await asyncio.gather(waited, fail(broker)))[0]

    done = lab.do(both)
    assert done.exit_code == 1 and "gated can't be loaded (gated): org/gated: 403 Forbidden" in done.stderr
    told = lab.models("list")
    assert "gated  failed" in told and "    gated: org/gated: 403 Forbidden\n    tried again from" in told


def test_a_key_for_a_model_nobody_knows_is_made_with_a_note(lab: Lab) -> None:
    lab.models("add", "org/big")
    done = lab.run("keys", "create", "--user", "ada", "--models", "org/bih")
    assert done.exit_code == 0 and done.stdout.startswith("ip_")
    assert "no model 'org/bih' is known here; did you mean org/big?" in done.stderr
    assert "note" not in lab.run("keys", "create", "--user", "ada", "--models", "org/big").stderr


def test_a_misspelt_setting_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERPOSE_SERVER_LEESE_S", "20")
    done = lab.run("models", "list")
    assert done.exit_code == 1
    assert "no setting INTERPOSE_SERVER_LEESE_S; did you mean INTERPOSE_SERVER_LEASE_S?" in done.stderr


def test_a_time_without_end_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERPOSE_SERVER_LEASE_S", "inf")
    done = lab.run("models", "list")
    assert done.exit_code == 1 and "INTERPOSE_SERVER_LEASE_S" in done.stderr and "finite" in done.stderr
