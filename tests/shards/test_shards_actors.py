"""A split copy's actors: their share of its bundles, one commit for all, and what they say when loading fails."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import torch
from interpose.errors import ConfigError, ReplicaLost
from interpose.runtime.split import building
from interpose_server.shards import actors
from models import tiny
from transformers import GPT2Config


def test_the_first_shard_has_what_the_replica_leaves() -> None:
    bundles = [{"CPU": 2.0, "GPU": 1.0, "fast": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    found = actors._places(bundles, {"CPU": 1.0, "GPU": 0.25, "fast": 1.0})
    assert found == [{"CPU": 1.0, "GPU": 0.75}, {"CPU": 1.0, "GPU": 1.0}]


@pytest.mark.parametrize("cause", [ConfigError("no such dtype"), torch.OutOfMemoryError("16 GiB more")])
def test_why_a_shard_cannot_load_is_told(cause: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(asked: Any) -> Any:
        raise ray.exceptions.RayTaskError("stand", "a trace", cause)

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(type(cause), match=str(cause)):
        actors._got([])


def test_a_shard_that_dies_while_it_loads_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(asked: Any) -> Any:
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ReplicaLost, match="while it was loading"):
        actors._got([])


def test_all_parts_are_of_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert building.commit_of(tiny("gpt2")) is None
    config = GPT2Config()
    config._commit_hash = "0123abcd"
    monkeypatch.setattr(building.Source, "config", lambda self: config)
    monkeypatch.setattr(building.Source, "of", classmethod(lambda cls, *args: cls("org/name", None, {})))
    assert building.commit_of("org/name") == "0123abcd"
