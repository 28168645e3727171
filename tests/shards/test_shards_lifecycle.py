"""More models than devices, on a real cluster of one core: loaded when asked for, making way for one another."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_lab import INTERPOSE, ClusterLab, Load, cluster_lab
from interpose import LanguageModel
from interpose.config import CONFIG
from interpose.errors import ModelFailed, ModelLoading, ModelUpdated
from models import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

PROMPT = [1, 2, 3, 4]
PATIENCE_S = 5

SMALL = {"name": "a", "source": str(tiny("gpt2")), "devices": 0.25, "replicas": {"min": 1}}
"""There is room for two versions of it at a time."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterLab]:
    with cluster_lab(tmp_path_factory.mktemp("lifecycle"), 1, hold_s=1, patience_s=PATIENCE_S) as lab:
        yield lab


@pytest.fixture
def client(lab: ClusterLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("INTERPOSE_CACHE", str(tmp_path / "cache"))
    CONFIG.HOST, CONFIG.API_KEY = lab.host, lab.key
    yield
    CONFIG.reset()


def last_block(name: str) -> torch.Tensor:
    model = LanguageModel(name)
    with model.trace(PROMPT, remote=True):
        saved: torch.Tensor = model.transformer.h[1].output[0].save()
    return saved.clone()


def right(arch: str) -> torch.Tensor:
    model = LanguageModel(tiny(arch))
    with model.trace(PROMPT):
        saved: torch.Tensor = model.transformer.h[1].output[0].save()
    return saved.clone()


def states(lab: ClusterLab) -> dict[str, str]:
    found = json.loads(lab.interpose("models", "list", "--json"))["models"]
    return {model["id"]: model["state"] for model in found}


def listed(lab: ClusterLab) -> dict[str, dict[str, Any]]:
    """All that operators are shown of each model."""
    return {model["id"]: model for model in json.loads(lab.interpose("models", "list", "--json"))["models"]}


def deployed(lab: ClusterLab, *models: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`deploy up`, whatever comes of it."""
    command = [INTERPOSE, "deploy", "up", lab.config(*models)]
    return subprocess.run(command, env=lab.env, capture_output=True, text=True, timeout=180)


def until(holds: Callable[[], bool], timeout_s: float = 90) -> None:
    ends = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.2)


def test_models_take_turns_on_one_device(lab: ClusterLab, client: None) -> None:
    base = {"source": str(tiny("gpt2")), "replicas": {"min": 0, "max": 1}, "devices": 1}
    lab.deploy(*({"name": name, **base} for name in ("a", "b")))
    assert states(lab) == {"a": "cold", "b": "cold"}
    expected = right("gpt2")

    # Never loaded: what it is isn't known, so the client waits before it can record.
    began = time.monotonic()
    torch.testing.assert_close(last_block("a"), expected)
    print(f"a model that never was loaded gave its first result after {time.monotonic() - began:.1f} s")
    assert states(lab) == {"a": "ready", "b": "cold"}

    # There is no room beside it, and it is idle.
    torch.testing.assert_close(last_block("b"), expected)
    assert states(lab) == {"a": "cold", "b": "ready"}
    assert "it makes way for b" in lab.interpose("models", "list")

    # Known by now: the job is taken at once, and told why it waits.
    model = LanguageModel("a")
    began = time.monotonic()
    with model.trace(PROMPT, remote=True, blocking=False) as t:
        saved = model.transformer.h[1].output[0].save()
    told = {t.job.model_state for _ in iter(lambda: t.job.status.terminal or time.sleep(0.05), True)}
    t.job.result(timeout=90)
    print(f"a cold model gave a result after {time.monotonic() - began:.1f} s, one that was idle making way")
    torch.testing.assert_close(saved, expected)
    assert told & {"cold", "crowded"}, "it heard that no copy runs, when it had just been taken"
    assert told <= {None, "cold", "crowded", "loading"}


def test_a_pinned_model_stays_and_one_that_cannot_be_loaded_is_told(lab: ClusterLab, client: None) -> None:
    lab.interpose("models", "pin", "a")
    lab.interpose("models", "add", "broken", "--source", str(lab.folder / "nowhere"), "--devices", "0.5")
    lab.interpose("models", "load", "a", "--wait")
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            last_block("broken")
        except ModelFailed as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(4)
    assert asking.is_alive() and states(lab)["a"] == "ready", "a is pinned, so that there is no room"
    lab.interpose("models", "unpin", "a")
    asking.join(90)
    (error,) = failures
    assert isinstance(error, ModelFailed) and error.details["reason"] == "missing"
    assert str(lab.folder) not in str(error)
    assert states(lab)["broken"] == "failed"
    assert "nowhere" in lab.interpose("models", "list")

    lab.interpose("models", "remove", "broken")
    ends = time.monotonic() + 60
    while "broken" in states(lab):
        assert time.monotonic() < ends
        time.sleep(0.2)


def test_a_model_that_is_never_idle_makes_way_for_one_that_waits(lab: ClusterLab, client: None) -> None:
    expected = right("gpt2")
    torch.testing.assert_close(last_block("a"), expected)
    with Load(lab, "a", tiny("gpt2")) as load:
        load.until_running()
        began = time.monotonic()
        torch.testing.assert_close(last_block("b"), expected)
        waited_s = time.monotonic() - began
        assert waited_s > PATIENCE_S and states(lab)["a"] != "ready"
    tally = load.finish()
    print(f"beside a model under load another gave a result after {waited_s:.1f} s; of the load: {tally}")
    assert tally.sound, "its jobs waited for their turn"


def test_jobs_recorded_before_an_update_are_run_before_it(lab: ClusterLab, client: None) -> None:
    """There is no room for both versions: the old one stops first."""
    expected, jobs = right("gpt2"), []
    base = {"source": str(tiny("gpt2")), "devices": 1}
    lab.deploy({"name": "a", **base}, {"name": "b", **base})
    torch.testing.assert_close(last_block("a"), expected)
    model = LanguageModel("a")
    for _ in range(30):
        with model.trace(PROMPT, remote=True, blocking=False) as t:
            saved = model.transformer.h[1].output[0].save()
        jobs.append((t.job, saved))
    lab.deploy({"name": "a", "dtype": "bfloat16", **base}, {"name": "b", **base})
    for job, saved in jobs:
        job.result(timeout=90)
        torch.testing.assert_close(saved, expected)
    found, ends = None, time.monotonic() + 60
    while found is None:
        assert time.monotonic() < ends
        try:
            found = last_block("a")
        except (ModelLoading, ModelUpdated):
            continue  # It was recorded just before the old one was told to stop, and refused just after.
    assert found.dtype is torch.bfloat16


def test_a_version_that_cannot_be_loaded_leaves_the_copy_of_before(lab: ClusterLab, client: None) -> None:
    lab.deploy(SMALL)
    done = deployed(lab, SMALL | {"source": str(lab.folder / "nowhere")})
    assert done.returncode == 1 and "a: failed: " in done.stderr and "nowhere" in done.stderr
    assert "ready" not in done.stderr and states(lab) == {"a": "ready"}


def test_what_is_larger_than_the_cluster_is_told_and_waits_for_a_node(lab: ClusterLab, client: None) -> None:
    """It takes nothing from what runs; nor does its copy, which Serve asks for, wait for a place that may come."""
    lab.deploy(SMALL)
    large = {**SMALL, "devices": 2}
    done = deployed(lab, large, {**large, "name": "b"})
    size = "a copy takes 2 cores; the cluster has 1 core, its largest node 1"
    assert done.returncode == 1 and f"a: failed (too_large): {size}. The version before is served on" in done.stderr
    assert f"b: failed (too_large): {size}. It can be loaded once" in done.stderr and "ready" not in done.stderr
    until(lambda: states(lab) == {"a": "ready", "b": "failed"})
    torch.testing.assert_close(last_block("a"), right("gpt2"))
    until(lambda: not sum(model["pending"] for model in listed(lab).values()))
    found = listed(lab)
    told = {"reason": "too_large", "detail": size}
    assert found["a"]["held_back"] == {**told, "served": True} and found["a"]["takes"] == [0.25]
    assert found["b"]["held_back"] == {**told, "served": False} and found["b"]["failure"]["reason"] == "too_large"

    deployed(lab, large)
    until(lambda: listed(lab).keys() == {"a"})
    lab.ray.add(2)
    until(lambda: listed(lab)["a"]["takes"] == [2.0] and len(listed(lab)["a"]["holds"]) == 1, 90)
    torch.testing.assert_close(last_block("a"), right("gpt2"))
    assert listed(lab)["a"]["held_back"] is None
