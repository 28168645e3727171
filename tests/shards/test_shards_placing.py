"""What a copy of a model asks of a cluster, and how its application is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interpose.errors import ConfigError
from interpose_server.models.devices import Devices
from interpose_server.models.spec import ModelSpec, Placement
from interpose_server.settings import Settings
from interpose_server.shards.choosing import chosen
from interpose_server.shards.naming import actor_of, app_name, worker_name
from interpose_server.shards.placing import Needs, check_possible, needs

PLAIN = Settings()


def of(*, gpus: bool, settings: Settings = PLAIN, **spec: Any) -> Needs:
    return needs(chosen(ModelSpec(name="tiny", **spec), lambda _: None), settings, gpus=gpus)


@pytest.mark.parametrize(("devices", "gpu"), [(None, 1), (0.25, 0.25), (4, 4)])
def test_a_device_is_a_gpu(devices: float | None, gpu: float) -> None:
    needed = of(gpus=True, devices=devices)
    assert (needed.options["num_gpus"], needed.options["num_cpus"]) == (gpu, 1)
    assert needed.devices(gpus=True) == (gpu,)


def test_without_devices_a_model_takes_cores_of_a_cluster_that_has_gpus() -> None:
    needed = of(gpus=True, devices=0)
    assert (needed.options["num_gpus"], needed.devices(gpus=True)) == (0, ())


@pytest.mark.parametrize(("devices", "cores"), [(None, 1), (0.5, 0.5), (2, 2), (0, 1)])
def test_without_gpus_a_device_is_a_core(devices: float | None, cores: float) -> None:
    needed = of(gpus=False, devices=devices)
    assert (needed.options["num_gpus"], needed.options["num_cpus"]) == (0, cores)
    assert needed.devices(gpus=False) == (cores,)


def test_threads_are_cores() -> None:
    assert of(gpus=True, settings=PLAIN.changed({"worker_threads": 3})).options["num_cpus"] == 3
    own = ModelSpec(name="tiny", settings={"worker_threads": 2})
    assert needs(chosen(own, lambda _: None), PLAIN, gpus=False).options["num_cpus"] == 2


def test_a_copy_in_parts_is_a_group_of_bundles_with_the_replica_in_the_first() -> None:
    needed = of(gpus=True, placement="blocks", shards=3, resources={"fast": 1})
    assert needed.bundles[0] == {"CPU": 2, "GPU": 1, "fast": 1}
    assert [*needed.bundles[1:]] == [{"CPU": 1, "GPU": 1}] * 2
    assert (needed.options["num_cpus"], needed.options["resources"]) == (1, {"fast": 1})
    assert 0 < needed.options["num_gpus"] < 1
    assert needed.devices(gpus=True) == (1, 1, 1)


def test_without_gpus_a_copy_in_parts_takes_what_its_shards_take() -> None:
    needed = of(gpus=False, placement="blocks", shards=2, devices=0.5)
    assert [dict(bundle) for bundle in needed.bundles] == [{"CPU": 0.5}] * 2
    assert needed.options["num_cpus"] == 0


@pytest.mark.parametrize(
    ("cards", "placement", "most"),
    [("80GB", Placement.DEVICE, 0.5), ("2x9GB", Placement.DEVICE, 1), ("3x2GB", Placement.DEVICES, 2)],
)
def test_size_decides_where_nothing_else_is_said(
    cards: str, placement: Placement, most: float, smollm2: Path
) -> None:
    found = chosen(ModelSpec(name="smol", source=str(smollm2)), lambda _: Devices.parse(cards))
    assert found.spec.placement is placement
    (part,) = needs(found, PLAIN, gpus=True).devices(gpus=True)
    assert 0 < part <= most


@pytest.mark.parametrize(
    ("said", "shards"),
    [({"shards": 3}, 3), ({"devices": 4}, 4), ({"devices": 0.5}, 2), ({"shards": 3, "devices": 3}, 3)],
)
def test_a_copy_has_as_many_parts_as_is_said(said: dict[str, Any], shards: int) -> None:
    placement = {} if "shards" in said else {"placement": "blocks"}
    found = chosen(ModelSpec(name="tiny", **said, **placement), lambda _: None).spec
    assert (found.placement, found.shards) == (Placement.BLOCKS, shards)


def test_what_is_said_is_not_planned() -> None:
    def never(_: ModelSpec) -> Devices:
        raise AssertionError

    assert chosen(ModelSpec(name="org/none", devices=2), never).spec.placement is Placement.DEVICES


def test_custom_resources_go_to_ray() -> None:
    assert of(gpus=False, resources={"lab": 0.5}).options["resources"] == {"lab": 0.5}


def test_names_of_applications_keep_models_apart() -> None:
    assert app_name("tiny") == "interpose-tiny"
    names = {app_name(model) for model in ("org/tiny", "org-tiny", "org_tiny", "org.tiny")}
    assert len(names) == 4 and all("/" not in name for name in names)


def test_a_replica_is_known_by_its_actor() -> None:
    assert actor_of(worker_name("0" * 30 + "ab")) == "0" * 30 + "ab"
    assert actor_of("vm#3:org/tiny") is None


@pytest.mark.filterwarnings("ignore")
def test_a_setting_of_gateways_makes_no_other_copy() -> None:
    from interpose_server.shards.apps import _mark

    def mark(settings: Settings) -> str:
        return _mark(ModelSpec(name="tiny"), settings, of(gpus=False, settings=settings))

    assert mark(PLAIN.model_copy(update={"metrics_open": True, "queued_per_user": 3})) == mark(PLAIN)
    assert mark(PLAIN.model_copy(update={"batch_jobs": 3})) != mark(PLAIN)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Serve's own, as it is imported
def test_the_brokers_password_is_not_among_what_serve_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from interpose_server.shards import apps

    monkeypatch.setattr(apps, "has_room", lambda _: True)
    settings = PLAIN.model_copy(update={"redis_url": "redis://:sesame@broker:6379/0"})
    spec = ModelSpec(name="tiny", devices=1)
    target: Any = apps._target(spec, settings, of(gpus=False, settings=settings), 1)
    deployment = target.target._bound_deployment
    (given,) = deployment.init_args
    assert given["name"] == "tiny"
    assert "sesame" not in f"{given} {deployment.init_kwargs} {deployment.ray_actor_options}"


GPUS = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0, "fast": 1.0}, {"CPU": 64.0}]


@pytest.mark.parametrize(
    "asked, stays, why",
    [
        ({"devices": 4}, [], ""),
        ({"devices": 4}, [(1.0,)], ""),
        (
            {"devices": 4},
            [(1.0,)] * 2,
            "4 GPUs; the cluster has 5 GPUs, its largest node 4, and other .* keep 2 GPUs",
        ),
        ({"devices": 5}, [], "a copy takes 5 GPUs; the cluster has 5 GPUs, its largest node 4$"),
        ({"placement": "blocks", "shards": 5}, [], ""),
        ({"placement": "blocks", "shards": 6}, [], "6 parts of 1 GPU, 6 in all; the cluster has 5 GPUs"),
        ({"devices": 0}, [(1.0,)] * 5, ""),
        ({"devices": 1, "resources": {"fast": 1}}, [], ""),
        ({"devices": 2, "resources": {"fast": 1}}, [], "no node has what a copy takes: 1 CPU, 2 GPU, 1 fast"),
        (
            {"devices": 1, "settings": PLAIN.changed({"worker_threads": 9})},
            [],
            "no node has what a copy takes: 9 CPU, 1 GPU",
        ),
    ],
)
def test_what_could_never_lie_on_a_cluster_is_told(
    asked: dict[str, Any], stays: list[tuple[float, ...]], why: str
) -> None:
    wanted = of(gpus=True, **asked)
    if not why:
        check_possible(wanted, GPUS, stays, gpus=True)
        return
    with pytest.raises(ConfigError, match=why) as caught:
        check_possible(wanted, GPUS, stays, gpus=True)
    assert caught.value.details["reason"] == ("too_large" if "cluster" in why else "misconfigured")


def test_a_cluster_without_devices_has_none() -> None:
    with pytest.raises(ConfigError, match="a copy takes 1 GPU; the cluster has no GPU"):
        check_possible(of(gpus=True, devices=1), [{"CPU": 4.0}], gpus=True)
