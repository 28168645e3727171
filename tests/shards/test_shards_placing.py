"""What a copy of a model asks of a cluster, and how its application is called."""

from __future__ import annotations

from typing import Any

import pytest
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings
from interpose_server.shards.naming import actor_of, app_name, worker_name
from interpose_server.shards.placing import Needs, needs

PLAIN = Settings()


def of(*, gpus: bool, settings: Settings = PLAIN, **spec: Any) -> Needs:
    return needs(ModelSpec(name="tiny", **spec), settings, gpus=gpus)


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
    assert needs(own, PLAIN, gpus=False).options["num_cpus"] == 2


def test_a_copy_in_parts_is_a_group_of_bundles_with_the_replica_in_the_first() -> None:
    needed = of(gpus=True, placement="blocks", shards=3, resources={"fast": 1})
    assert needed.bundles[0] == {"CPU": 1, "GPU": 1, "fast": 1}
    assert [*needed.bundles[1:]] == [{"CPU": 1, "GPU": 1}] * 3
    assert needed.options["resources"] == {"fast": 1}


def test_custom_resources_go_to_ray() -> None:
    assert of(gpus=False, resources={"lab": 0.5}).options["resources"] == {"lab": 0.5}


def test_names_of_applications_keep_models_apart() -> None:
    assert app_name("tiny") == "interpose-tiny"
    names = {app_name(model) for model in ("org/tiny", "org-tiny", "org_tiny", "org.tiny")}
    assert len(names) == 4 and all("/" not in name for name in names)


def test_a_replica_is_known_by_its_actor() -> None:
    assert actor_of(worker_name("0" * 30 + "ab")) == "0" * 30 + "ab"
    assert actor_of("vm#3:org/tiny") is None
