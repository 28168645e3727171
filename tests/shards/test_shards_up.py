"""`interpose deploy up` where nothing runs yet: Ray, Valkey, gateway and models from one command."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import redis
import yaml
from interpose import LanguageModel
from models import tiny
from serving import INTERPOSE, Served, deploy, parts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TINY = {"name": "org/tiny", "source": str(tiny("gpt2")), "replicas": {"min": 1}, "settings": {"measure_s": 0}}


def interpose(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([INTERPOSE, *words], capture_output=True, text=True, timeout=180)


def workers(lab: Served) -> dict[str, set[int]]:
    """Copies of the one model, as the broker knows them, and the processes of replicas."""
    told = json.loads(interpose("models", "list", "--json", "--data-dir", lab.data_dir).stdout)
    replicas = {one.pid for one in parts(lab, "ray::ServeReplica:interpose-org")}
    (model,) = told["models"]
    assert told["devices"]["free"] == told["devices"]["total"] - 1
    assert [held["worker"] for held in model["holds"]] == list(model["workers"])
    return {",".join(model["workers"]): replicas}


def test_one_command_serves_and_ctrl_c_ends_all_it_started(tmp_path: Path) -> None:
    config = tmp_path / "lab.yaml"
    with deploy(config, TINY) as lab:
        model = LanguageModel("org/tiny", host=lab.host, api_key=lab.key)
        with model.trace("The capital of France is", remote=True):
            logits = model.output[0, -1].save()
        assert logits.shape[0] > 100
        token = lab.data_dir / "ray-token"
        assert token.stat().st_mode & 0o077 == 0

        ends = time.monotonic() + 60
        while True:
            done = interpose("deploy", "status", config)
            # Devices are counted every two seconds.
            if re.search("copy .*: 1 core of ", done.stdout) or time.monotonic() > ends:
                break
        assert done.returncode == 0 and "org/tiny  ready  1 copy  0 waiting" in done.stdout
        assert re.search(r"^\d+ of \d+ cores free, 1 node; no node has a GPU$", done.stdout, re.M)
        assert "a copy takes 1 core" in done.stdout and re.search("copy .*: 1 core of ", done.stdout)

        before = workers(lab)
        done = interpose("deploy", "up", config)
        assert done.returncode == 0 and workers(lab) == before

        plain = yaml.safe_load(config.read_text())
        config.write_text(json.dumps(plain | {"models": [TINY, TINY | {"name": "other"}]}))
        done = interpose("deploy", "up", config)
        assert done.returncode == 0 and "other: ready" in done.stderr

        started = psutil.Process(lab.process.pid).children(recursive=True)
        lab.process.send_signal(signal.SIGINT)
        assert lab.process.wait(90) == 0
    gone, alive = psutil.wait_procs(started, 60)
    assert gone and not alive


def test_taking_all_models_down_ends_it_in_one_line(tmp_path: Path) -> None:
    config = tmp_path / "lab.yaml"
    with deploy(config, TINY | {"replicas": {"min": 0}}) as lab:
        plain = yaml.safe_load(config.read_text())
        config.write_text(json.dumps(plain | {"port": 9, "settings": {"rate_per_s": 5}}))
        done = interpose("deploy", "up", config)
        assert done.returncode == 0
        assert "port is 9 now; the cluster keeps 0 until it is started again" in done.stderr
        assert "settings.rate_per_s is 5.0 now; what runs here keeps 1000.0 until" in done.stderr
        with redis.Redis.from_url(json.loads((lab.data_dir / "server.json").read_text())["redis_url"]) as broker:
            assert broker.config_get("appendfsync") == {"appendfsync": "always"}
        assert "did you mean org/tiny" in interpose("deploy", "down", config, "org/tine").stderr

        done = interpose("deploy", "down", config)
        assert done.returncode == 0 and "stopped" in done.stderr
        assert lab.process.wait(90) == 0
    said = lab.data_dir.with_name(f"{lab.data_dir.name}.log").read_text()
    assert said.splitlines()[-2:] == ["all models are taken down; stopping", "stopped"]
    assert "SIGTERM" not in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"models": []}, "models: holds nothing"),
        ({"rays": "auto"}, "rays: there is no such key here; did you mean ray?"),
        ({"settings": {"leases": 1}}, "leases: there is no such setting; did you mean lease_s?"),
        ({"ray": "127.0.0.1:1", "port": 0}, "no Ray cluster can be used at 127.0.0.1:1: "),
    ],
)
def test_a_file_that_cannot_be_is_refused_at_once(tmp_path: Path, change: dict[str, object], word: str) -> None:
    config = tmp_path / "lab.yaml"
    config.write_text(json.dumps({"data_dir": str(tmp_path / "data"), "models": [TINY]} | change))
    done = interpose("deploy", "up", config)
    assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr
