"""Models on a Ray cluster: loaded when somebody asks, let go, replaced under load; what dies costs time only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from cluster_lab import ClusterLab, Load, cluster_lab
from models import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

TINY = {"name": "org/tiny", "source": str(tiny("gpt2")), "replicas": {"min": 2, "max": 2}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterLab]:
    with cluster_lab(tmp_path_factory.mktemp("cluster"), 2, 2) as lab:
        lab.deploy(TINY)
        lab.until_copies("org/tiny", 2)
        yield lab


def model(lab: ClusterLab, name: str) -> dict[str, Any]:
    with lab.client() as client:
        return next(one for one in client.get("/v1/models").json()["models"] if one["id"] == name)


def test_what_dies_under_load_costs_time_only(lab: ClusterLab) -> None:
    """Both copies of a model, then Serve's controller while they are replaced by others with other settings."""
    with Load(lab, "org/tiny", tiny("gpt2")) as load:
        load.until_running()
        lab.stop_at_work(replicas := lab.ray.processes("ServeReplica:interpose-org-tiny"))
        for replica in replicas:
            replica.kill()
        lab.until_copies("org/tiny", 0)
        lab.until_copies("org/tiny", 1)
        before = {replica.pid for replica in lab.ray.processes("ServeReplica:interpose-org-tiny")}
        lab.deploy(TINY | {"settings": {"batch_jobs": 16}})
        (controller,) = lab.ray.processes("ServeController")
        controller.kill()
        while before & {replica.pid for replica in lab.ray.processes("ServeReplica:interpose-org-tiny")}:
            time.sleep(0.2)
        load.until_submitted(100)
    tally = load.finish()
    print(tally)
    assert tally.sound and tally.accepted > 100 and tally.requeued


def test_a_node_that_dies_under_load_costs_time_only(lab: ClusterLab) -> None:
    """A node goes with the copies on it, which have jobs; as many run again once there is another node."""
    lab.until_copies("org/tiny", 2)
    with Load(lab, "org/tiny", tiny("gpt2")) as load:
        load.until_running()
        copies, took_s = lab.lose_node("org/tiny", replaced=True)
        lab.until_copies("org/tiny", 2)
        load.until_submitted(max(load.submitted + 20, 100))
    tally = load.finish()
    print(f"{copies} of 2 copies died with a node; both ran again after {took_s:.1f} s: {tally}")
    assert tally.sound and tally.accepted > 100 and tally.requeued


def test_a_model_comes_when_asked_for_and_goes_when_idle(lab: ClusterLab) -> None:
    cold = {"name": "cold", "source": str(tiny("gpt2")), "idle_s": 2, "settings": {"batch_jobs": 2}}
    broken = {"name": "broken", "source": str(lab.folder / "nothing"), "replicas": {"min": 1}}
    with pytest.raises(AssertionError, match="broken: failed"):
        lab.deploy(TINY, cold, broken)
    assert (model(lab, "cold")["state"], model(lab, "cold")["copies"]) == ("cold", 0)
    with lab.client() as client:
        while client.get("/v1/models/cold").status_code == 503:
            time.sleep(0.2)
    with Load(lab, "cold", tiny("gpt2"), most=8) as load:
        load.until_submitted(7)
    assert load.finish().sound
    lab.until_copies("cold", 0)
    assert model(lab, "broken")["failure"]
    while lab.ray.processes("ServeReplica:interpose-broken"):
        time.sleep(0.1)


def test_a_model_taken_down_under_load_ends_the_jobs_it_has(lab: ClusterLab) -> None:
    with Load(lab, "org/tiny", tiny("gpt2"), most=60) as load:
        load.until_submitted(59)
        lab.interpose("deploy", "down", lab.config(TINY), "org/tiny")
    assert load.finish().sound
    assert not lab.ray.processes("ServeReplica:interpose-org-tiny")
