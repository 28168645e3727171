"""What an operator's file may say, and what it is told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpose.errors import ConfigError
from interpose_server.models.spec import ClusterConfig, Placement, read_specs


def read(folder: Path, text: str) -> ClusterConfig:
    (folder / "cluster.yaml").write_text(text)
    return ClusterConfig.read(folder / "cluster.yaml")


def test_a_name_alone_is_a_model(tmp_path: Path) -> None:
    (model,) = read(tmp_path, "models: [{name: org/model}]").models
    assert (model.place, model.placement, model.replicas.max) == ("org/model", Placement.AUTO, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: []", "models"),
        ("models: [{name: a}, {name: a}]", "two models are named 'a'"),
        ("models: [{name: 'a b'}]", "models.0.name"),
        ("models: [{name: a, device: 2}]", "models.0.device"),
        ("models: [{name: a, devices: 1.5}]", "devices come whole"),
        ("models: [{name: a, placement: blocks, adapters: {b: /x}}]", "adapters can't be chosen yet"),
        ("models: [{name: a, adapters: {'my one': /x}}]", "models.0.adapters: an adapter is named by"),
        ("models: [{name: a, replicas: {min: 3, max: 2}}]", "can't both be"),
        ("models: [", "no YAML"),
        ("[" * 5000, "no YAML"),
        ("models: [!!python/object/apply:os.getcwd []]", "no YAML"),
        ("models: [{name: a, settings: {batch_s: .inf}}]", "JSON can't say"),
        ("models: [{name: a, settings: &all {limits: *all}}]", "JSON can't say"),
        ("models: [{name: a, settings: {since: 2020-01-01}}]", "JSON can't say"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml") as caught:
        read(tmp_path, text)
    assert told in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        ClusterConfig.read(tmp_path / "none.yaml")


FOLDERS = "{name: a, source: ./weights, adapters: {fr: ../lora, hub: org/lora, whole: /lora}}"


@pytest.mark.parametrize("text", [FOLDERS, f"- {FOLDERS}", f"models: [{FOLDERS}]"])
def test_folders_are_taken_from_where_the_file_lies(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "catalogue" / "models.yaml"
    file.parent.mkdir()
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    found = [*read_specs(Path("catalogue/models.yaml"))]
    found += ClusterConfig.read(file).models if "models" in text else ()
    for spec in found:
        assert spec.source == str(file.parent / "weights")
        assert spec.adapters == {"fr": str(tmp_path / "lora"), "hub": "org/lora", "whole": "/lora"}
