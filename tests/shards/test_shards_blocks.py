"""A model in block ranges on a Ray cluster of two nodes: served as any other; a shard that dies costs time only."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import torch
from cluster_lab import ClusterLab, Load, cluster_lab
from interpose import LanguageModel
from interpose.graph.manifest import decode_manifest
from interpose.runtime.loading import load as load_whole
from lora import lora, stock
from models import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

ROW = [5, 9, 33, 7]

SPLIT = {
    "name": "org/split",
    "source": str(tiny("gpt2")),
    "placement": "blocks",
    "shards": 2,
    "adapters": {"a": str(lora("gpt2"))},
    "replicas": {"min": 1},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterLab]:
    with cluster_lab(tmp_path_factory.mktemp("blocks"), 2, 2) as lab:
        lab.deploy(SPLIT)
        lab.until_copies("org/split", 1)
        yield lab


def test_its_manifest_is_the_whole_models(lab: ClusterLab) -> None:
    with lab.client() as client:
        answer = client.get("/v1/models/org/split", headers={"Accept": "application/json"})
    plain = answer.json()
    found = decode_manifest(plain.get("manifest", plain))
    whole = load_whole(tiny("gpt2"), device="cpu", adapters={"a": lora("gpt2")}).manifest
    assert (found.revision, found.adapters) == (whole.revision, whole.adapters)
    print(sorted(" ".join(p.cmdline()).strip()[:60] for p in lab.ray.processes("")))
    assert len(lab.ray.processes("ShardActor")) == 2


def logits(lab: ClusterLab, adapter: str | None) -> torch.Tensor:
    model = LanguageModel("org/split", host=lab.host, api_key=lab.key)
    with model.trace(ROW, remote=True, adapter=adapter):
        found = model.logits.save()
    return found.detach()


def test_jobs_choose_an_adapter(lab: ClusterLab) -> None:
    for name, folder in [("a", lora("gpt2")), (None, None), ("a", lora("gpt2"))]:
        with torch.no_grad():
            expected = stock("gpt2", folder)(torch.tensor([ROW])).logits
        torch.testing.assert_close(logits(lab, name), expected, rtol=0, atol=1e-4)


def test_operators_see_on_which_devices_its_parts_lie(lab: ClusterLab) -> None:
    ends = time.monotonic() + 60
    while not (model := json.loads(lab.interpose("models", "list", "--json"))["models"][0])["holds"]:
        assert time.monotonic() < ends
    devices = json.loads(lab.interpose("models", "list", "--json"))["devices"]
    assert (devices["kind"], devices["total"], devices["free"]) == ("core", 4, 2)
    free = {node["name"]: node["free"] for node in devices["nodes"]}
    assert len(free) == 2 and model["takes"] == [1, 1]
    for node in free:
        assert sum(held["devices"] for held in model["holds"] if held["node"] == node) == 2 - free[node]


def test_a_shard_that_dies_under_load_costs_time_only(lab: ClusterLab) -> None:
    with Load(lab, "org/split", tiny("gpt2")) as load:
        load.until_running()
        shards = lab.ray.processes("ShardActor")
        before = {shard.pid for shard in shards}
        lab.stop_at_work(homes := lab.ray.processes("ServeReplica:interpose-org-split"))
        shards[1].kill()
        for home in homes:
            home.resume()
        began = time.monotonic()
        lab.until_copies("org/split", 0)
        lab.until_copies("org/split", 1, 150)
        print(f"back after {time.monotonic() - began:.1f} s")
        assert not before & {shard.pid for shard in lab.ray.processes("ShardActor")}, (
            "all shards of a copy end with it"
        )
    tally = load.finish()
    print(tally)
    assert tally.sound
    assert tally.requeued
    test_jobs_choose_an_adapter(lab)


def test_shards_end_with_their_copy(lab: ClusterLab) -> None:
    lab.interpose("deploy", "down", lab.config(SPLIT), "org/split")
    began = time.monotonic()
    while lab.ray.processes("ShardActor"):
        assert time.monotonic() - began < 90
        time.sleep(0.1)
