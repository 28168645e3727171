"""Parts of a Ray cluster die under load: every accepted job ends once, with the values it would have alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster_lab import ClusterLab, Load, cluster_lab
from models import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterLab]:
    with cluster_lab(tmp_path_factory.mktemp("cluster"), 2, 2) as lab:
        yield lab


def test_what_dies_under_load_costs_time_only(lab: ClusterLab) -> None:
    model = {"name": "org/tiny", "source": str(tiny("gpt2")), "replicas": {"min": 2, "max": 2}}
    lab.deploy(model)
    lab.until_copies("org/tiny", 2)
    with Load(lab, "org/tiny", tiny("gpt2")) as load:
        load.until_running()
        for replica in lab.ray.processes("ServeReplica:interpose-org-tiny"):
            replica.kill()
        lab.until_copies("org/tiny", 0)
        print(f"the first of two killed replicas is back after {lab.until_copies('org/tiny', 1):.1f} s")
        lab.until_copies("org/tiny", 2)
        (controller,) = lab.ray.processes("ServeController")
        controller.kill()
        lab.deploy(model | {"settings": {"batch_jobs": 16}})
    tally = load.finish()
    print(tally)
    assert tally.sound and tally.accepted > 100 and tally.requeued
