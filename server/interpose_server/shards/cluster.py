"""Reaching a Ray cluster, and the Serve on it."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from interpose.errors import ConfigError, first_line
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..models.devices import Devices
from ..models.rules import Room
from ..models.spec import ModelSpec
from ..settings import Settings
from . import ray_internals
from .local import OBJECT_BYTES

NAMESPACE = "interpose"

MODELS_NOTE = "models"
"""Model -> of what is deployed, a digest of how it is hosted, as Serve takes whatever it is given for something
new, the devices of the parts of a copy, and whether those are GPUs; why its entry isn't that, if so."""

APPLIED_NOTE = "applied"
"""The catalogue's revision, and a digest of the settings, that the keeper has seen to."""

STOPPING_NOTE = "stopping"
"""Whether the server is being stopped: copies wait no longer than its grace."""

ASK_S = 60.0
KNOCK_S = 5.0

_SETTINGS_NOTE = "settings"


def start(temp_dir: Path, connected: Callable[[], object] = lambda: None) -> str:
    """Start a cluster on this machine, as a part of this process. Returns its address. Raises ConfigError.

    Args:
        connected: called as soon as Ray runs in this process, before Serve does.
    """
    ray_internals.RAY.check()
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
    connected()
    _start_serve()
    return str(ray.get_runtime_context().gcs_address)


def join(address: str, connected: Callable[[], object] = lambda: None) -> None:
    """Use a cluster that runs; `connected` as of `start`. Raises ConfigError if there is none that lets us in."""
    ray_internals.RAY.check()
    _hush()
    if address.startswith("ray://"):
        raise ConfigError(f"{address} is for Ray's client, which can't be used; give the cluster's own, HOST:6379")
    try:
        _knock(address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = first_line(error)
        advice = ""
        if "Failed to connect" in reason:
            advice = "; something listens there, which may ask for a token: RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH"
        raise ConfigError(f"no Ray cluster can be used at {address}: {reason}{advice}") from error
    connected()
    _start_serve()


def _knock(address: str) -> None:
    """Raises OSError if nothing listens at HOST:PORT, for which Ray would wait many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()


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


def nodes() -> int:
    return len(total())


def on_gpus(noted: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a device is a GPU: any node has one, or had one when what is noted was deployed.

    They may be away for a while, in which no model is to move to cores.
    """
    return any(has.get("GPU") for has in total().values()) or any(note.get("gpus") for note in noted.values())


def room(*, gpus: bool) -> Room:
    """The GPUs of each node that has one; else the cores of each."""
    nodes = [*total().values()]
    kind = "GPU" if gpus else "CPU"
    having = tuple(has for has in nodes if has.get(kind))
    return Room(tuple(has[kind] for has in having), resources=having)


class Cards:
    """The cluster's GPUs, looked at once, when somebody asks."""

    def __init__(self) -> None:
        self._found: list[list[int]] | None = None

    def __call__(self, spec: ModelSpec) -> Devices | None:
        """All there are, with their memory, or what the spec says of that; None where there are none."""
        counts = {node: int(has["GPU"]) for node, has in total().items() if has.get("GPU", 0) >= 1}
        if not counts:
            return None
        if spec.device_memory is not None:
            return Devices.of([[spec.device_memory] * count for count in counts.values()])
        if self._found is None:
            self._found = _memory(counts)
        return Devices.of(self._found)


def _memory(counts: Mapping[str, int]) -> list[list[int]]:
    """Bytes of each GPU of each node. Asked on the nodes themselves; none of their GPUs has to be free for that."""
    asked = {
        node: ray.remote(num_cpus=0)(ray_internals.card_bytes)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote()
        for node in counts
    }
    try:
        found: dict[str, list[int]] = {node: ray.get(answer, timeout=ASK_S) for node, answer in asked.items()}
    except ray.exceptions.RayError as error:
        why = "the memory of the cluster's GPUs can't be asked; say device_memory for each model"
        raise ConfigError(why) from error
    return [found[node][:count] for node, count in counts.items()]


def has_room(resources: Iterable[Mapping[str, float]]) -> bool:
    """Whether bundles fit beside what runs on the cluster now. Nodes are filled first fit."""
    nodes = [dict(free) for free in ray_internals.free_resources().values()]
    for bundle in resources:
        node = next((free for free in nodes if all(free.get(k, 0) >= v for k, v in bundle.items())), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] = node.get(name, 0) - amount
    return True


def total() -> Mapping[str, Mapping[str, float]]:
    """Node -> what it has of each resource."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


class Notes:
    """Small facts kept by the cluster itself, gone when it goes."""

    def read(self, name: str) -> Any:
        raw = ray_internals.read_value(name, NAMESPACE)
        return None if raw is None else json.loads(raw)

    def write(self, name: str, value: Any) -> None:
        ray_internals.write_value(name, json.dumps(value), NAMESPACE)


def share(settings: Settings) -> None:
    """Leave the settings where what runs on the cluster finds them.

    They hold the broker's password, and so stand nowhere else: not among the arguments that Serve keeps and shows.
    """
    Notes().write(_SETTINGS_NOTE, settings.model_dump(mode="json"))


def shared() -> Settings:
    """The settings that were left. Raises ConfigError if there are none."""
    found = Notes().read(_SETTINGS_NOTE)
    if found is None:
        raise ConfigError("this Ray cluster knows no settings of Interpose; run `interpose deploy up` again")
    return Settings(**found)
