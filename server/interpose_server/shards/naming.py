"""What models are called on Serve, and replicas in the broker."""

from __future__ import annotations

import hashlib
import os
import re

PREFIX = "interpose-"
_REPLICA = "SERVE_REPLICA::"

_NAME = re.compile(r".*#([0-9a-f]{32})")


def app_name(model: str) -> str:
    """Of a model's application."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", model)
    if safe == model:
        return PREFIX + model
    return f"{PREFIX}{safe}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def is_replica(actor: str, app: str) -> bool:
    """Whether Serve's name for an actor is that of a replica of an application."""
    return actor.startswith(f"{_REPLICA}{app}#")


def is_copy(actor: str) -> bool:
    """Whether it is that of a replica of any of our models. Others may use the same Serve."""
    return actor.startswith(_REPLICA + PREFIX)


def worker_name(actor: str) -> str:
    """Of a replica: after its node, for people, and its actor, for Ray. No other ever has it."""
    return f"{os.uname().nodename}#{actor}"


def actor_of(worker: str) -> str | None:
    """The id of a worker's actor; None for one that is no actor."""
    found = _NAME.fullmatch(worker)
    return found[1] if found else None
