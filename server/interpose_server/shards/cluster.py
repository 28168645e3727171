"""Reaching a Ray cluster, and the Serve on it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from interpose.errors import ConfigError
from ray import serve
from ray._private import state
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from .local import OBJECT_BYTES

NAMESPACE = "interpose"

SETTINGS_NOTE = "settings"
"""Of the server, for whoever needs them on the cluster. They hold the broker's password, and so stand nowhere that
Serve shows or logs."""

MODELS_NOTE = "models"
"""Model -> a digest of how it is hosted. Serve itself takes whatever it is given for something new."""


def start(temp_dir: Path) -> str:
    """Start a cluster on this machine, as a part of this process. Returns its address."""
    _hush()
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        object_store_memory=OBJECT_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(temp_dir),
    )
    _start_serve()
    return str(ray.get_runtime_context().gcs_address)


def join(address: str) -> None:
    """Use a cluster that runs. Raises ConfigError if there is none, or none that lets us in."""
    _hush()
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(f"no Ray cluster can be used at {address}: {reason}") from error
    _start_serve()


def leave() -> None:
    """Ends the cluster too, if this process started it."""
    ray.shutdown()


def _hush() -> None:
    """What Ray says of how it starts is for its developers."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _start_serve() -> None:
    # Nothing is asked of replicas over HTTP: they claim their jobs themselves.
    serve.start(proxy_location="Disabled")


def devices() -> tuple[bool, tuple[float, ...]]:
    """Whether any node has a GPU, and how many each node that has one has; without any, its cores."""
    total: Mapping[str, Mapping[str, float]] = state.total_resources_per_node()  # type: ignore[no-untyped-call]
    gpus = any(has.get("GPU") for has in total.values())
    found = (has.get("GPU" if gpus else "CPU", 0.0) for has in total.values())
    return gpus, tuple(number for number in found if number)


def has_room(resources: Iterable[Mapping[str, float]]) -> bool:
    """Whether bundles fit beside what runs on the cluster now. Nodes are filled first fit."""
    nodes = [dict(free) for free in _free().values()]
    for bundle in resources:
        node = next((free for free in nodes if all(free.get(k, 0) >= v for k, v in bundle.items())), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] = node.get(name, 0) - amount
    return True


def _free() -> Mapping[str, Mapping[str, float]]:
    """Node -> what it has left of each resource."""
    found: Mapping[str, Mapping[str, float]] = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return found


class Notes:
    """Small facts kept by the cluster itself, gone when it goes."""

    def read(self, name: str) -> Any:
        raw = _internal_kv_get(name, namespace=NAMESPACE)
        return None if raw is None else json.loads(raw)

    def write(self, name: str, value: Any) -> None:
        _internal_kv_put(name, json.dumps(value), namespace=NAMESPACE)

    def drop(self, name: str) -> None:
        _internal_kv_del(name, namespace=NAMESPACE)
