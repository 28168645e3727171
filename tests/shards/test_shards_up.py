"""`interpose deploy up` where nothing runs yet: Ray, Valkey, gateway and models from one command."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from interpose import LanguageModel
from models import tiny
from serving import INTERPOSE, deploy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TINY = {"name": "org/tiny", "source": str(tiny("gpt2")), "replicas": {"min": 1}, "settings": {"measure_s": 0}}


def interpose(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([INTERPOSE, *words], capture_output=True, text=True, timeout=120)


def test_one_command_serves_and_ctrl_c_ends_all_it_started(tmp_path: Path) -> None:
    config = tmp_path / "lab.yaml"
    with deploy(config, TINY) as lab:
        model = LanguageModel("org/tiny", host=lab.host, api_key=lab.key)
        with model.trace("The capital of France is", remote=True):
            logits = model.output[0, -1].save()
        assert logits.shape[0] > 100
        token = lab.data_dir / "ray-token"
        assert token.stat().st_mode & 0o077 == 0

        done = interpose("deploy", "status", config)
        assert done.returncode == 0 and "org/tiny  ready  1 copy  0 waiting" in done.stdout

        plain = yaml.safe_load(config.read_text())
        config.write_text(json.dumps(plain | {"models": [TINY, TINY | {"name": "other"}]}))
        done = interpose("deploy", "up", config)
        assert done.returncode == 0 and "other: ready" in done.stderr

        started = psutil.Process(lab.process.pid).children(recursive=True)
        lab.process.send_signal(signal.SIGINT)
        assert lab.process.wait(60) == 0
    gone, alive = psutil.wait_procs(started, 10)
    assert gone and not alive


@pytest.mark.parametrize(
    ("change", "word"),
    [({"models": []}, "models"), ({"rays": "auto"}, "rays"), ({"settings": {"leases": 1}}, "leases")],
)
def test_a_file_that_cannot_be_is_refused_at_once(tmp_path: Path, change: dict[str, object], word: str) -> None:
    config = tmp_path / "lab.yaml"
    config.write_text(json.dumps({"data_dir": str(tmp_path / "data"), "models": [TINY]} | change))
    done = interpose("deploy", "up", config)
    assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr
