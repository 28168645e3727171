"""What is needed of Ray beyond its public names: all of it here, and none of it elsewhere.

`ray.util.state` tells of actors and nodes too, but asks the dashboard, which a cluster needn't run; and it doesn't
tell what nodes have left.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from interpose.runtime.internals import Internals

_STATE, _VALUES = "ray._private.state", "ray.experimental.internal_kv"
_SERVE = "ray.serve.context"
_MESSAGES, _CARDS = "ray.core.generated.common_pb2", "ray._private.thirdparty.pynvml"

RAY = Internals(
    "ray",
    "2.60",
    {
        _STATE: ("available_resources_per_node", "actors"),
        _VALUES: ("_internal_kv_get", "_internal_kv_put"),
        _SERVE: ("_get_global_client",),
        _MESSAGES: ("ActorDiedErrorContext",),
        _CARDS: ("nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"),
    },
)

# A field that isn't there, or something that isn't iterable, or a name of a message that isn't.
_OTHER_FORM = (AttributeError, KeyError, TypeError, ValueError)


class Death(Enum):
    """How an actor came to its end: `KILLED` by whoever had made it, or `FAILED`."""

    KILLED = "killed"
    FAILED = "failed"


class Living(NamedTuple):
    """An actor's name, and its node."""

    name: str
    node: str


class Stopping(NamedTuple):
    """Applications of Serve all of whose replicas stop; of others' replicas that do, the actors and their names."""

    apps: frozenset[str] = frozenset()
    actors: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Node -> what it has left of each resource."""
    with RAY.shaped("what nodes have left", *_OTHER_FORM):
        return {node: dict(free) for node, free in RAY.part(_STATE, "available_resources_per_node")().items()}


def death(actor: str) -> Death | None:
    """Why an actor is no more; None while it lives, and of one that Ray never knew.

    Raises ConfigError if this Ray doesn't tell.
    """
    with RAY.shaped("how actors died", *_OTHER_FORM):
        found = RAY.part(_STATE, "actors")(actor_id=actor)
        if not found or found["State"] != "DEAD":
            return None
        reason = found["DeathCause"].actor_died_error_context.reason
        killed = RAY.part(_MESSAGES, "ActorDiedErrorContext").Reason.Value("RAY_KILL")
    return Death.KILLED if reason == killed else Death.FAILED


def living(actor: str) -> Living | None:
    """An actor that isn't dead."""
    with RAY.shaped("where actors are", *_OTHER_FORM):
        found = RAY.part(_STATE, "actors")(actor_id=actor)
        if not found or found["State"] == "DEAD":
            return None
        return Living(found["Name"], found["Address"]["NodeID"])


def stopping() -> Stopping:
    """What Serve has told to stop, also as a health check failed, and that isn't gone.

    Raises ConfigError if this Ray doesn't tell.
    """
    with RAY.shaped("the states of replicas", *_OTHER_FORM):
        apps = RAY.part(_SERVE, "_get_global_client")().get_serve_details()["applications"]
        replicas = [
            replica
            for app in apps.values()
            for deployment in app["deployments"].values()
            for replica in deployment["replicas"]
            if replica["state"] == "STOPPING"
        ]
        # Of an application that is deleted it tells no replicas.
        deleted = frozenset(name for name, app in apps.items() if app["status"] == "DELETING")
        # One that never had a place has a name alone.
        actors = frozenset(str(replica["actor_id"]) for replica in replicas if replica.get("actor_id"))
        names = frozenset(str(replica["actor_name"]) for replica in replicas)
    return Stopping(deleted, actors, names)


def waiting() -> set[str]:
    """The names of actors that have no place yet."""
    with RAY.shaped("where actors are", *_OTHER_FORM):
        found = RAY.part(_STATE, "actors")(actor_state_name="PENDING_CREATION")
        return {actor["Name"] for actor in found.values()}


def card_bytes() -> list[int]:
    """Memory of each GPU of the machine this runs on, whoever uses them."""
    RAY.part(_CARDS, "nvmlInit")()
    handles = map(RAY.part(_CARDS, "nvmlDeviceGetHandleByIndex"), range(RAY.part(_CARDS, "nvmlDeviceGetCount")()))
    return [int(RAY.part(_CARDS, "nvmlDeviceGetMemoryInfo")(handle).total) for handle in handles]


def read_value(name: str, namespace: str) -> bytes | None:
    """What the cluster keeps under a name, as long as it lasts."""
    found: bytes | None = RAY.part(_VALUES, "_internal_kv_get")(name, namespace=namespace)
    return found


def write_value(name: str, value: str, namespace: str) -> None:
    RAY.part(_VALUES, "_internal_kv_put")(name, value, namespace=namespace)
