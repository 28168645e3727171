"""The script that a Ray head's container runs, with stand-ins for `ray` and `interpose`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "ray-head"
RAY = """#!/bin/sh
[ "$1" = health-check ] && exit 0
trap 'echo "ray ends" >>"$LOG"; exit 0' TERM
echo "ray $*" >>"$LOG"
while :; do sleep 0.1; done
"""
INTERPOSE = """#!/bin/sh
echo "interpose $*" >>"$LOG"
exec sleep "${LASTS:-0}"
"""


def seen(log: Path) -> set[str]:
    """The first two words of each line."""
    return {" ".join(line.split()[:2]) for line in log.read_text().splitlines()} if log.exists() else set()


@pytest.mark.parametrize(
    ("settings", "started"),
    [
        ({}, "ray start --head --block --port=6379 --include-dashboard=false --disable-usage-stats"),
        ({"NODE_IP": "10.0.0.1"}, "--object-store-memory=1000000000 --node-ip-address=10.0.0.1"),
        (
            {"KUBERAY_GEN_RAY_START_CMD": "ray start --head --num-cpus=0 --block"},
            "ray start --head --num-cpus=0 --block",
        ),
    ],
)
@pytest.mark.parametrize("lasts", ["0", "60"])
def test_ray_is_started_models_deployed_and_a_signal_ends_it(
    tmp_path: Path, settings: dict[str, str], started: str, lasts: str
) -> None:
    log = tmp_path / "log"
    for name, text in (("ray", RAY), ("interpose", INTERPOSE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = os.environ | settings | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "LASTS": lasts}
    process = subprocess.Popen([SCRIPT, "models.yaml"], env=env, start_new_session=True)
    try:
        ends = time.monotonic() + 60
        while not {"ray start", "interpose deploy"} <= seen(log):
            assert time.monotonic() < ends and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(9) is not None, "no orderly end within what a container gets"
        assert started in log.read_text() and "interpose deploy up models.yaml" in log.read_text()
        assert "ray ends" in log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
