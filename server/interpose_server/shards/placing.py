"""What a copy of a model asks Ray for: the replica's own resources, or a placement group for copies in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interpose.errors import ConfigError

from ..broker.failures import TOO_LARGE
from ..models.inventory import count, outgrown
from ..models.packing import Parts, packs
from ..models.spec import Placement
from ..settings import Settings
from .choosing import Chosen

ENV = {
    # Threads of torch that spin while they wait for one another stall on a busy machine.
    "OMP_WAIT_POLICY": "passive",
    # Fresh memory in huge pages costs a third of what it does page by page.
    "THP_MEM_ALLOC_ENABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Read before a process's first line runs, so that the replica can't set them itself."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Attributes:
    options: Ray's of the replica's actor.
    bundles: of its placement group, one for each shard; empty where the replica is all there is of a copy.
    """

    options: Mapping[str, Any]
    bundles: Sequence[Mapping[str, float]] = field(default=())

    @property
    def all(self) -> list[Mapping[str, float]]:
        """What has to be found on one node each."""
        options = self.options
        own = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options["resources"]}
        return [*self.bundles] or [own]

    def devices(self, *, gpus: bool) -> tuple[float, ...]:
        """Of each bundle; cores, where no node has a GPU."""
        kind = "GPU" if gpus else "CPU"
        return tuple(bundle[kind] for bundle in self.all if bundle.get(kind))


def needs(chosen: Chosen, settings: Settings, *, gpus: bool) -> Needs:
    """What one copy takes of a cluster.

    Where no node has a GPU, a device is one core: a copy on two devices has two, and computes with two threads.
    A copy in parts has a bundle for each. Its replica lies in the first, beside the first shard, and takes a core
    and the home's share of the device of it; the shard has what is left. Without GPUs it shares that shard's cores.

    Args:
        settings: their `worker_threads` are the cores beside a GPU, or instead of what `devices` says of cores.
        gpus: whether any node of the cluster has one.
    """
    spec = chosen.spec
    assert spec.devices is not None
    threads: int | None = spec.settings.get("worker_threads", settings.worker_threads)
    own = _devices(spec.devices, gpus, threads)
    if spec.placement is not Placement.BLOCKS:
        return Needs(_options(own, spec.resources))
    assert spec.shards is not None
    shard = _devices(min(spec.devices, 1.0), gpus, threads)
    home = {"CPU": 1.0, "GPU": chosen.home_share * shard["GPU"]} if "GPU" in shard else {"CPU": 0.0}
    first = {**shard, "CPU": shard["CPU"] + home["CPU"], **spec.resources}
    return Needs(_options(home, spec.resources), (first, *([shard] * (spec.shards - 1))))


def check_possible(
    wanted: Needs, nodes: Sequence[Mapping[str, float]], stays: Sequence[Parts] = (), *, gpus: bool
) -> None:
    """See that a copy could lie on a cluster, were all gone that ever may go.

    Args:
        nodes: what each has of each resource, in use or not.
        stays: what copies take that are there, and never go.

    Raises:
        ConfigError: it couldn't, with the numbers.
    """
    kind, name = ("GPU", "GPU") if gpus else ("CPU", "core")
    parts, devices = wanted.devices(gpus=gpus), [node[kind] for node in nodes if node.get(kind)]
    if not packs([parts, *stays], devices):
        others = sum(map(sum, stays)) if packs([parts], devices) else 0
        beside = f", and other models always keep {count(others, name)} of that" if others else ""
        raise ConfigError(outgrown(parts, devices, name) + beside, details={"reason": TOO_LARGE})
    for part in wanted.all:
        if not any(all(node.get(its, 0) >= amount for its, amount in part.items()) for node in nodes):
            asked = ", ".join(f"{amount:g} {its}" for its, amount in part.items() if amount)
            raise ConfigError(f"no node has what a copy takes: {asked}", details={"reason": "misconfigured"})


def _devices(devices: float, gpus: bool, threads: int | None) -> dict[str, float]:
    if gpus and devices > 0:
        return {"CPU": float(threads or 1), "GPU": devices}
    return {"CPU": float(threads or devices or 1)}


def _options(own: Mapping[str, float], resources: Mapping[str, float]) -> dict[str, Any]:
    return {
        "num_cpus": own["CPU"],
        "num_gpus": own.get("GPU", 0),
        "resources": dict(resources),
        "runtime_env": {"env_vars": ENV},
    }
