"""What a copy of a model asks Ray for: the replica's own resources, or a placement group for copies in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models.spec import ModelSpec, Placement
from ..settings import Settings

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
    bundles: of its placement group, the replica in the first and one shard in each of the others; empty for none.
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


def needs(spec: ModelSpec, settings: Settings, *, gpus: bool) -> Needs:
    """What one copy takes of a cluster.

    Where no node has a GPU, a device is one core: a copy on two devices has two, and computes with two threads.

    Args:
        settings: their `worker_threads` are the cores beside a GPU, or instead of what `devices` says of cores.
        gpus: whether any node of the cluster has one.
    """
    threads: int | None = spec.settings.get("worker_threads", settings.worker_threads)
    one = _devices(spec.devices if spec.devices is not None else 1.0, gpus, threads)
    if spec.placement is Placement.BLOCKS:
        shard = _devices(min(spec.devices or 1.0, 1.0), gpus, threads)
        bundles = [{**one, **spec.resources}, *([shard] * (spec.shards or 2))]
        return Needs(_options(bundles[0]), tuple(bundles))
    return Needs(_options({**one, **spec.resources}))


def _devices(devices: float, gpus: bool, threads: int | None) -> dict[str, float]:
    if gpus and devices > 0:
        return {"CPU": float(threads or 1), "GPU": devices}
    return {"CPU": float(threads or devices or 1)}


def _options(bundle: Mapping[str, float]) -> dict[str, Any]:
    own = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    return {
        "num_cpus": bundle["CPU"],
        "num_gpus": bundle.get("GPU", 0),
        "resources": own,
        "runtime_env": {"env_vars": ENV},
    }
