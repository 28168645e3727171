"""`interpose serve` as processes: what it prints, what it refuses, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from fake_hub import Hub, serving_hub
from interpose.errors import ConfigError, InvalidPayload
from interpose.wire.status import JobStatus
from interpose_server import embedded
from interpose_server.broker import keys
from interpose_server.broker.connect import Broker
from interpose_server.broker.states import ModelState
from interpose_server.embedded import tell_end, tell_start, vouch
from interpose_server.processes import Child
from interpose_server.tasks import end
from interpose_server.wanted import Served as ServedModel
from interpose_server.wanted import with_adapters
from models import tiny
from rig import Clock, new_job, tiny_manifest
from serving import Served, parts, runs, serve

INTERPOSE = Path(sys.executable).with_name("interpose")


def interpose(*words: str | Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [INTERPOSE, *words], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(f"tiny={tiny('gpt2')}", data_dir=tmp_path_factory.mktemp("lab") / "data") as served:
        yield served


def test_adapters_are_given_to_models(tmp_path: Path) -> None:
    one, two = ServedModel("one", "org/one"), ServedModel("two", "org/two")
    (found,) = with_adapters([one], [f"a={tmp_path}", "b=org/b"])
    assert found.adapters == {"a": str(tmp_path), "b": "org/b"}
    assert [m.adapters for m in with_adapters([one, two], [f"two:a={tmp_path}"])] == [{}, {"a": str(tmp_path)}]
    for texts, said in (
        ([f"a={tmp_path}"], "say of which model"),
        (["one:a"], "write NAME=FOLDER"),
        (["one:=x/y"], "write NAME=FOLDER"),
        (["three:a=x/y"], "no model 'three' is served here, but one, two"),
        (["one:a=x/y", "one:a=x/z"], "already"),
        (["one:a=./nowhere"], "no folder './nowhere'"),
        (["one:a=nowhere"], "no folder 'nowhere'"),
    ):
        with pytest.raises(ConfigError, match=said):
            with_adapters([one, two], texts)


def family(served: Served) -> list[psutil.Process]:
    """The supervisor and everything it started."""
    root = psutil.Process(served.process.pid)
    return [root, *root.children(recursive=True)]


def until(ready: Callable[[], bool], timeout_s: float = 90) -> None:
    ends = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.02)


def get(served: Served, path: str, key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key or served.key}"}
    return httpx.get(served.host + path, headers=headers, trust_env=False, timeout=60)


def test_it_serves_what_it_was_given(lab: Served) -> None:
    (model,) = get(lab, "/v1/models").json()["models"]
    assert (model["id"], model["state"]) == ("tiny", "ready")
    assert get(lab, "/v1/models/tiny/tokenizer").json()["model"]
    assert "tiny" in httpx.get(lab.host, trust_env=False, timeout=60).text
    names = sorted(process.name() for process in family(lab)[1:])
    assert len(names) == 3 and "valkey-server" in names


def test_secrets_are_in_no_command_line_and_private_on_disk(lab: Served) -> None:
    lines = " ".join(word for process in family(lab) for word in process.cmdline())
    assert lab.key not in lines and "@" not in lines
    for name in ("local-key", "server.json", "valkey/valkey.conf"):
        assert (lab.data_dir / name).stat().st_mode & 0o077 == 0, name
    assert lab.data_dir.stat().st_mode & 0o077 == 0


def test_keys_on_a_running_server(lab: Served) -> None:
    made = interpose("keys", "create", "--user", "bob", "--data-dir", lab.data_dir)
    token = made.stdout.strip()
    assert get(lab, "/v1/me", token).json()["user"] == "bob"
    listed = interpose("keys", "list", "--data-dir", lab.data_dir).stdout
    assert token not in listed and len(listed.splitlines()) == 2
    (key_id,) = (line.split()[0] for line in listed.splitlines() if " bob " in line)
    assert interpose("keys", "revoke", key_id, "--data-dir", lab.data_dir).returncode == 0
    assert get(lab, "/v1/me", token).status_code == 401
    assert "no key" in interpose("keys", "revoke", key_id, "--data-dir", lab.data_dir).stderr


def test_status(lab: Served, tmp_path: Path) -> None:
    assert "tiny  ready  0 waiting" in interpose("status", "--data-dir", lab.data_dir).stdout
    assert interpose("status", "--data-dir", tmp_path).returncode == 1


def test_one_server_a_folder(lab: Served) -> None:
    second = interpose("serve", f"tiny={tiny('gpt2')}", "--port", "0", "--data-dir", lab.data_dir)
    assert second.returncode == 1 and "a server runs on" in second.stderr.replace("another", "a")
    assert get(lab, "/healthz").status_code == 200


NAMES = {"valkey": "valkey-server", "gateway": "interpose_server.gateway", "worker": "interpose_server.worker"}


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_part_comes_back(lab: Served, name: str) -> None:
    (victim,) = parts(lab, NAMES[name])
    victim.kill()
    until(lambda: not runs(victim))

    def back() -> bool:
        try:
            return len(family(lab)) == 4 and get(lab, "/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    until(back)
    assert get(lab, "/v1/me").status_code == 200


def gone(processes: list[psutil.Process]) -> bool:
    return not any(map(runs, processes))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_behind(tmp_path: Path, number: signal.Signals) -> None:
    data = tmp_path / "data"
    with serve(f"tiny={tiny('gpt2')}", data_dir=data) as served:
        processes = family(served)
        assert len(processes) == 4
        served.process.send_signal(number)
        served.process.wait(90)
        until(lambda: gone(processes))
        assert served.process.returncode == (-9 if number is signal.SIGKILL else 0)
    # The folder is free again, and the key still the same.
    listed = interpose("keys", "list", "--data-dir", data)
    assert listed.returncode == 0 and " local " in listed.stdout


def test_stopping_while_a_model_loads(tmp_path: Path) -> None:
    command = [INTERPOSE, "serve", f"tiny={tiny('gpt2')}", "--port", "0", "--data-dir", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "starting the gateway" not in process.stderr.readline():
            pass
        processes = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    assert gone(processes)


def test_others_can_connect_only_with_keys(tmp_path: Path) -> None:
    words = ("serve", f"tiny={tiny('gpt2')}", "--host", "0.0.0.0", "--port", "0", "--data-dir", tmp_path)
    refused = interpose(*words)
    assert refused.returncode == 1 and "keys create" in refused.stderr
    assert gone([process for process in psutil.process_iter() if str(tmp_path) in " ".join(_cmdline(process))])


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return [] if process.pid == os.getpid() else process.cmdline()
    except psutil.Error:
        return []


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = interpose("serve", f"tiny={tiny('gpt2')}", "--port", port, "--data-dir", tmp_path)
    assert done.returncode == 1 and "can't listen" in done.stderr and "Traceback" not in done.stderr


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = interpose("serve", str(tmp_path / "empty"), "--port", "0", "--data-dir", tmp_path / "data")
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == ""


def test_names_of_models(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert ServedModel.parse(str(folder)) == ServedModel("my-model", str(folder))
    assert ServedModel.parse(f"other={folder}") == ServedModel("other", str(folder))
    assert ServedModel.parse("org/name") == ServedModel("org/name", "org/name")
    for text in ("./nothing", "x=/nothing", "/nothing"):
        with pytest.raises(ConfigError):
            ServedModel.parse(text)
    for text in ("a b", "../../nothing", f"../x={folder}"):
        with pytest.raises((InvalidPayload, ConfigError)):
            ServedModel.parse(text)


def test_a_model_the_hub_does_not_give_is_told_once(tmp_path: Path) -> None:
    with serving_hub(Hub({}, gated={"org/gated"})) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        words = [INTERPOSE, "serve", "org/gated", "--port", "0", "--data-dir", tmp_path / "data"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if "can't be loaded" in line]
    assert len(told) == 1 and "starting it again" not in done.stderr
    assert hub.asked["org/gated"] < 12, "one try's worth"


async def test_who_started_a_worker_says_that_it_lives_and_when_it_died(broker: Broker) -> None:
    """A process that takes its time before it says anything itself."""
    heard, models = keys.HEARD.format(model="tiny"), broker.models
    worker = Child(
        "a worker", [sys.executable, "-c", "import time; time.sleep(60)"], print,
        ended=partial(tell_end, broker, "tiny", "w1"),
    )  # fmt: skip
    vouching = asyncio.create_task(vouch(broker, "tiny", "w1", worker))
    try:
        await models.announce("tiny", "w1", ModelState.LOADING)
        await broker.redis.zadd(heard, {"w1": 1})
        await asyncio.sleep(1.2)
        assert not (await models.get("tiny")).copies, "it doesn't run yet"
        await worker.start()
        async with asyncio.timeout(90):
            while (await models.get("tiny")).copies != {"w1": ModelState.LOADING}:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert await models.bury() == [] and worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        async with asyncio.timeout(90):
            while (hosted := await models.get("tiny")).failure is None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert "ended with status -9 while it loaded tiny" in hosted.failure.detail
        await models.announce("tiny", "w1", ModelState.LOADING)
        await models.publish("tiny", "w1", tiny_manifest(), "")
        await broker.redis.zadd(heard, {"w1": 1})
        await asyncio.sleep(1.2)
        assert not (await models.get("tiny")).copies, "once it runs jobs it speaks for itself"
    finally:
        await end([vouching])
        await worker.stop(30)


@asynccontextmanager
async def watched(broker: Broker, program: str, **how: float) -> AsyncIterator[tuple[Child, list[str]]]:
    """A worker's process, as `serve` starts and watches it; and what the operator is told."""
    told: list[str] = []
    worker = Child(
        "a worker", [sys.executable, "-c", program], told.append,
        ended=partial(tell_end, broker, "tiny", "w1"), again=partial(tell_start, broker, "tiny", "w1"),
    )  # fmt: skip
    await broker.models.announce("tiny", "w1", ModelState.LOADING)
    await worker.start()
    vouching = asyncio.create_task(vouch(broker, "tiny", "w1", worker, **how))
    try:
        yield worker, told
    finally:
        await end([vouching])
        await worker.stop(30)


async def test_a_worker_that_hangs_before_it_speaks_is_ended_told_of_and_started_again(broker: Broker) -> None:
    """As in an import that never ends. After the third time in a row those who wait are told."""
    job = new_job()
    await broker.queue.submit(job)
    async with watched(broker, "import time; time.sleep(60)", load_s=0.5) as (worker, told):
        first = worker.pid
        async with asyncio.timeout(90):
            while (await broker.queue.info(job.user, job.id)).status is JobStatus.QUEUED:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        hosted = await broker.models.get("tiny")
        assert hosted.failure is not None and (hosted.failure.reason, hosted.failure.tries) == ("timeout", 3)
        assert "its process said nothing for 0.5 s" in hosted.failure.detail
        assert len(told) >= 2 and all("ended with status -9; starting it again" in line for line in told)
        async with asyncio.timeout(90):
            while (await broker.models.get("tiny")).state is not ModelState.LOADING:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert worker.pid != first


async def test_one_that_speaks_may_load_for_longer_until_it_hangs(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal, it neither loads nor runs jobs any more."""
    clock, heard = Clock(), keys.HEARD.format(model="tiny")
    monkeypatch.setattr(embedded, "time", clock)
    async with watched(broker, "import time; time.sleep(600)", load_s=20.0) as (worker, told):
        for _ in range(3):
            await broker.models.beat("tiny", "w1")
            at = await broker.redis.zscore(heard, "w1") or 0
            async with asyncio.timeout(90):
                while (await broker.redis.zscore(heard, "w1") or 0) <= at:  # noqa: ASYNC110 - it is vouched for
                    await asyncio.sleep(0.02)
            clock.now += 15
        assert not told and (await broker.models.get("tiny")).failure is None
        await broker.models.publish("tiny", "w1", tiny_manifest(), "")
        first = worker.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        async with asyncio.timeout(90):
            while worker.pid == first:
                clock.now += 1
                await asyncio.sleep(0.02)
        hosted = await broker.models.get("tiny")
        assert (hosted.state, hosted.failure) == (ModelState.LOADING, None)
