"""Models as Serve applications: one each, so that changing one leaves the others alone."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from interpose.errors import ConfigError, InterposeError
from ray import serve
from ray.serve import RunTarget
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from ..models.spec import ModelSpec
from ..settings import GATEWAYS, LIFECYCLE, Settings
from .choosing import chosen
from .cluster import MODELS_NOTE, Cards, Notes, has_gpus, has_room
from .naming import app_name
from .placing import Needs, needs
from .replica import Replica

DEPLOYMENT = "model"

MOST = 10_000
"""Copies as far as Serve is concerned. How many there may be is for the policy, so that saying otherwise in the
catalogue restarts nothing."""

POLL_S = 0.1

BEYOND_GRACE_S = 10.0
"""What ends a replica that doesn't stop waits so much longer than the replica itself."""

SCHEDULING = {"replicas", "pinned", "idle_s", "schedule", "load_s"}
"""What of a spec says how many copies there are, and nothing of what a copy is."""


@dataclass(frozen=True, slots=True)
class State:
    """Of an application: Serve's word for it, and what it says beyond that."""

    status: str
    message: str
    running: int


@dataclass(frozen=True, slots=True)
class Applied:
    """`changed`: models that were deployed; `refused`: those that can't be, and why."""

    changed: Sequence[str]
    refused: Mapping[str, InterposeError]


def apply(specs: Sequence[ModelSpec], settings: Settings) -> Applied:
    """Deploy models that are new or are to be hosted in another way, with settings that were shared before.

    A copy that runs is replaced once its successor is ready, where the cluster has room for both. Else it stops
    first, and jobs wait meanwhile.
    """
    notes, gpus = Notes(), has_gpus()
    known: dict[str, dict[str, Any]] = notes.read(MODELS_NOTE) or {}
    cards = Cards()
    deployed = states()
    targets, changed, refused = [], {}, {}
    for spec in specs:
        try:
            where = chosen(spec, cards)
            wanted = needs(where, settings, gpus=gpus)
            note = {"mark": _mark(where.spec, settings, wanted), "parts": wanted.devices(gpus=gpus)}
            state = deployed.get(spec.name)
            if known.get(spec.name, {}).get("mark") == note["mark"] and _sound(state):
                continue
            copies = min(max(spec.replicas.min, state.running if state else 0), spec.replicas.max)
            targets.append(_target(where.spec, settings, wanted, copies))
        except InterposeError as error:
            refused[spec.name] = error
        except (ValueError, TypeError, ArithmeticError) as error:
            # What Ray doesn't take of one model is no reason to hold up the others.
            refused[spec.name] = ConfigError(f"Ray doesn't take what a copy of {spec.name} asks for: {error}")
        else:
            changed[spec.name] = note
    if targets:
        notes.write(MODELS_NOTE, known | changed)
        serve.run_many(targets, wait_for_applications_running=False)
    return Applied(list(changed), refused)


def settings_mark(settings: Settings) -> str:
    return _digest(settings.model_dump(mode="json"))


def remove(models: Sequence[str], wait_s: float = 0.0) -> None:
    """Take models down: each copy finishes the batch it runs, and gives back the jobs it only claimed.

    Args:
        wait_s: returns once they are gone, or after so long. Serve's own waiting ends in an error after a minute,
            and takes each in turn.
    """
    notes, there = Notes(), states()
    going = {app_name(model) for model in models if model in there}
    for name in going:
        serve.delete(name, _blocking=False)
    ends = time.monotonic() + wait_s
    while going & serve.status().applications.keys() and time.monotonic() < ends:
        time.sleep(POLL_S)
    known: dict[str, Any] = notes.read(MODELS_NOTE) or {}
    notes.write(MODELS_NOTE, {name: note for name, note in known.items() if name not in models})


def states() -> dict[str, State]:
    """Of the models deployed here, by name."""
    apps, found = serve.status().applications, {}
    for model in Notes().read(MODELS_NOTE) or {}:
        if (app := apps.get(app_name(model))) is None:
            continue
        deployment = app.deployments.get(DEPLOYMENT)
        running = _running(deployment.replica_states) if deployment else 0
        message = app.message or (deployment.message if deployment else "")
        found[model] = State(str(app.status.value), message, running)
    return found


def _running(copies: Mapping[Any, int]) -> int:
    return sum(number for state, number in copies.items() if state == "RUNNING")


def _sound(state: State | None) -> bool:
    return state is not None and state.status not in ("DEPLOY_FAILED", "DELETING", "NOT_STARTED")


def _target(spec: ModelSpec, settings: Settings, wanted: Needs, copies: int) -> RunTarget:
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="interpose_server.shards.policy:Policy",
        policy_kwargs={"model": spec.name, "least": spec.replicas.min},
    )
    scaling = AutoscalingConfig(
        min_replicas=0,
        initial_replicas=copies,
        max_replicas=MOST,
        # The policy knows about delays.
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=policy,
    )
    group: dict[str, Any] = {}
    if wanted.bundles:
        group = {"placement_group_bundles": list(map(dict, wanted.bundles)), "placement_group_strategy": "PACK"}
    deployment = serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options=dict(wanted.options),
        autoscaling_config=scaling,
        health_check_period_s=5,
        health_check_timeout_s=20,
        graceful_shutdown_wait_loop_s=0.05,
        graceful_shutdown_timeout_s=_stops_within_s(spec, settings),
        max_surge_percent=100 if has_room(wanted.all) else 0,
        rolling_update_percentage=1.0 if copies < 2 else 0.5,
        **group,
    )(Replica)
    app = deployment.bind(spec.model_dump(mode="json"))
    return RunTarget(target=app, name=app_name(spec.name), route_prefix=None)


def _stops_within_s(spec: ModelSpec, settings: Settings) -> float:
    """A copy that is let go first runs what only it can, then finishes its batch, whose jobs have their time."""
    try:
        own = settings.changed(spec.settings)
    except ConfigError:
        own = settings  # which its loading will tell
    return own.finish_s + own.limits.wall_s + own.grace_s + BEYOND_GRACE_S


def _mark(spec: ModelSpec, settings: Settings, wanted: Needs) -> str:
    hosting = spec.model_dump(mode="json", exclude=SCHEDULING)
    own = settings.model_dump(mode="json", exclude=set(GATEWAYS | LIFECYCLE))
    return _digest([hosting, own, wanted.options, list(wanted.bundles), version("interpose")])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
