"""What an operator's file may say, and what it is told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpose.errors import ConfigError
from interpose.runtime import sources
from interpose_server.models import spec
from interpose_server.models.spec import ClusterConfig, Placement, read_specs

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
"""Two to the fortieth values, in forty lines."""


def read(folder: Path, text: str) -> ClusterConfig:
    (folder / "cluster.yaml").write_text(text)
    return ClusterConfig.read(folder / "cluster.yaml")


def test_a_name_alone_is_a_model(tmp_path: Path) -> None:
    (model,) = read(tmp_path, "models: [{name: org/model}]").models
    assert (model.place, model.placement, model.replicas.max) == ("org/model", Placement.AUTO, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: []", "1: models: holds nothing"),
        ("port: 1\nmodels:\n- name: a\n- name: a", "2: models: two models are named 'a'"),
        ("models:\n- {name: 'a b'}", "2: models.0.name: a model's name is"),
        ("models:\n- name: a\n  device: 2", "3: models.0.device: there is no such key here; did you mean devices?"),
        ("rays: auto\nmodels: [{name: a}]", "1: rays: there is no such key here; did you mean ray?"),
        ("gpu: 1\nmodels: [{name: a}]", "there are ray, redis_url, data_dir"),
        ("dtype: x\nmodels: [{name: a}]", "1: dtype: there is no such key here; it belongs to a model"),
        ("models:\n- name: a\n  port: 1", "3: models.0.port: there is no such key here; it belongs at the"),
        ("models:\n- name: a\n  batch_s: 1", "3: models.0.batch_s: there is no such key here; it belongs under"),
        (
            "models:\n- name: a\n  placement: block",
            "auto, device, devices, blocks, not 'block'; did you mean blocks?",
        ),
        (
            "models:\n- name: a\n  dtype: bf16",
            "3: models.0.dtype: has to be one of auto, float32, float16, bfloat16,",
        ),
        ("models:\n- name: a\n  dtype: bf16", "not 'bf16'; did you mean bfloat16?"),
        ("models:\n- name: a\n  devices: two", "3: models.0.devices: has to be a number, not 'two'"),
        ("models:\n- name: a\n  revision: 12", "has to be text, not 12; write it in quotes"),
        ("models:\n- name: a\n  replicas:\n    min: -1", "4: models.0.replicas.min: has to be at least 0, not -1"),
        ("models:\n- name: a\n  replicas: 2", "3: models.0.replicas: has to be keys with values, not 2"),
        ("port: 99999\nmodels: [{name: a}]", "1: port: has to be at most 65535, not 99999"),
        ("host: h", "1: models: is missing"),
        ("", "is empty"),
        ("- name: a", "1: has to be keys with values, not a list"),
        ("models:\n- name: a\n  name: b", "3: the key 'name' stands there twice"),
        ("models:\n\t- name: a", "2: this is no YAML: found character '\\t'"),
        ("settings:\n  leases: 2\nmodels: [{name: a}]", "settings.leases: there is no such setting; did you mean"),
        ("settings: {lease_s: 0}\nmodels: [{name: a}]", "settings.lease_s: has to be above 0, not 0"),
        ("settings: {limits: {wal_s: 3}}\nmodels: [{name: a}]", "no limit 'wal_s'; did you mean wall_s?"),
        ("settings: {redis_url: x}\nmodels: [{name: a}]", "settings.redis_url: it belongs at the top of the file"),
        ("models:\n- name: a\n  settings:\n    lease_s: 3", "4: models.0.settings.lease_s: can't differ from"),
        ("models: [{name: a, devices: 1.5}]", "devices come whole"),
        ("models: [{name: a, adapters: {'my one': /x}}]", "models.0.adapters: an adapter is named by"),
        ("models: [{name: a, replicas: {min: 3, max: 2}}]", "can't both be"),
        (
            "models:\n- name: a\n  resources:\n    GPU: 1",
            "4: models.0.resources.GPU: is no resource of your own; devices",
        ),
        (
            "models:\n- name: a\n  resources: {fast: -1}",
            "3: models.0.resources.fast: has to be a whole number, or a part",
        ),
        ("models: [{name: a, resources: {fast: 1.5}}]", "with up to four digits, not 1.5"),
        ("models: [{name: a, settings: {worker_threads: -5}}]", "worker_threads: has to be at least 1, not -5"),
        ('models: [{name: a, "\\e[2J\\n": 1}]', r"models.0.'\x1b[2J\n': there is no such key here"),
        (f"models: [{{name: a, shards: 0x{'f' * 5000}}}]", "at most 10000, not a number of thousands of digits"),
        ("models: [{name: a, shards: 3, devices: 2}]", "takes one device at most; shards says how many parts"),
        ("models: [", "no YAML"),
        ("[" * 5000, "no YAML"),
        ("models: [!!python/object/apply:os.getcwd []]", "no YAML"),
        ("models: [{name: a, settings: {batch_s: .inf}}]", "JSON can't say"),
        ("models: [{name: a, settings: &all {limits: *all}}]", "JSON can't say"),
        (BOMB, "its aliases stand for more than 1,000,000 values"),
        ("models: [{name: a, settings: {since: 2020-01-01}}]", "JSON can't say"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml") as caught:
        read(tmp_path, text)
    assert told in str(caught.value)


def test_the_dtypes_are_those_that_can_be_loaded() -> None:
    assert ("auto", *sources.DTYPES) == spec.DTYPES


def test_all_mistakes_are_told_in_their_order_and_nothing_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "models:\n- name: a\n  device: 1\n- nam: b\nport: x")
    lines = [line.partition("cluster.yaml:")[2].partition(": ")[0::2] for line in str(caught.value).splitlines()]
    assert [(number, told.partition(":")[0]) for number, told in lines] == [
        *(("3", "models.0.device"), ("4", "models.1.nam"), ("4", "models.1.name"), ("5", "port")),
    ]


def test_passwords_are_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "redis_url: {redis: secret}\nmodels: [{name: a}]")
    assert "redis_url: has to be text" in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        ClusterConfig.read(tmp_path / "none.yaml")


@pytest.mark.parametrize("source", ["~nobody-of-this-name/x", "./a\\0b"])
def test_a_folder_that_none_can_be_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        read(tmp_path, f'models: [{{name: a, source: "{source}"}}]')


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
    for one in found:
        assert one.source == str(file.parent / "weights")
        assert one.adapters == {"fr": str(tmp_path / "lora"), "hub": "org/lora", "whole": "/lora"}
