"""What of Ray's figures operators are shown: nodes, their devices, and which copy lies on which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import ray
from ray.util import placement_group_table

from ..models.inventory import Inventory, Node
from . import ray_internals
from .apps import held_back
from .cluster import MODELS_NOTE, Notes, on_gpus, total
from .naming import actor_of, app_name, is_replica


def inventory(workers: Iterable[str], waiting: Set[str]) -> Inventory:
    """Args:
    workers: those that are heard of, as the broker names them.
    waiting: names of actors that have no place yet.
    """
    noted: Mapping[str, Mapping[str, Any]] = Notes().read(MODELS_NOTE) or {}
    kind = "GPU" if on_gpus(noted) else "CPU"
    names, left = _names(), ray_internals.free_resources()
    nodes = {node: has[kind] for node, has in total().items() if has.get(kind)}
    takes = {model: [float(part) for part in note["parts"]] for model, note in noted.items()}
    groups = {group["name"]: group for group in placement_group_table().values()}
    held = ((worker, _held(worker, kind, takes, groups, names)) for worker in workers)
    return Inventory(
        kind="GPU" if kind == "GPU" else "core",
        nodes=[
            Node(names.get(node, node[:8]), float(has), round(left.get(node, {}).get(kind, 0.0), 4))
            for node, has in sorted(nodes.items(), key=lambda one: names.get(one[0], one[0]))
        ],
        takes=takes,
        holds={worker: parts for worker, parts in held if parts},
        pending=_pending(takes, groups, waiting),
        held_back={model: why for model, note in noted.items() if (why := held_back(note))},
    )


def _names() -> dict[str, str]:
    """Node -> what people call it: its host, and where several nodes are on one, Ray's id of it."""
    hosts = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in ray.nodes()}  # type: ignore[no-untyped-call]
    counts = Counter(hosts.values())
    return {node: host if counts[host] == 1 else f"{host}/{node[:6]}" for node, host in hosts.items()}


def _held(
    worker: str,
    kind: str,
    takes: Mapping[str, Sequence[float]],
    groups: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, str],
) -> list[tuple[str, float]]:
    """Nodes and devices of each part of a copy."""
    actor = actor_of(worker)
    found = ray_internals.living(actor) if actor else None
    if found is None:
        return []
    if (group := groups.get(found.name)) is not None:
        return [
            (names.get(node, node[:8]), float(group["bundles"][index].get(kind, 0)))
            for index, node in sorted(group["bundles_to_node_id"].items())
        ]
    model = next((model for model in takes if is_replica(found.name, app_name(model))), None)
    return [(names.get(found.node, found.node[:8]), sum(takes[model]))] if model is not None else []


def _pending(
    takes: Mapping[str, Sequence[float]], groups: Mapping[str, Mapping[str, Any]], waiting: Set[str]
) -> dict[str, int]:
    """Model -> copies that have been asked for and have no place yet."""
    names = {group["name"] for group in groups.values() if group["state"] == "PENDING"} | waiting
    return {
        model: number for model in takes if (number := sum(is_replica(name, app_name(model)) for name in names))
    }
