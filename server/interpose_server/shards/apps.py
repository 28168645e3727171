"""Models as Serve applications: one each, so that changing one leaves the others alone."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from interpose.errors import ConfigError, InternalError, InterposeError, first_line
from ray import serve
from ray.exceptions import RayError
from ray.serve import RunTarget
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from ..broker.failures import reason_of
from ..models.inventory import HeldBack
from ..models.packing import Parts
from ..models.spec import ModelSpec
from ..settings import GATEWAYS, LIFECYCLE, Settings
from .choosing import chosen
from .cluster import MODELS_NOTE, Cards, Notes, has_room, on_gpus, total
from .naming import app_name
from .placing import Needs, check_possible, needs
from .replica import Replica

log = logging.getLogger(__name__)

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
    """Of an application: Serve's word for it, and what it says beyond that.

    Attributes:
        running: copies that are loaded.
        begun: those on their way, too.
        held_back: why there are no copies as the model's entry says, and can't be.
    """

    status: str
    message: str
    running: int
    begun: int
    held_back: HeldBack | None


@dataclass(frozen=True, slots=True)
class Applied:
    """Attributes:
    changed: models that were deployed.
    refused: those that can't be, and of which there was nothing before.
    held_back: those that can't be, while what was deployed of them before is served on; as far as that is new.
    """

    changed: Sequence[str]
    refused: Mapping[str, InterposeError]
    held_back: Mapping[str, InterposeError]


def apply(specs: Sequence[ModelSpec], settings: Settings) -> Applied:
    """Deploy models that are new or are to be hosted in another way, with settings that were shared before.

    A copy that runs is replaced once its successor is ready, where the cluster has room for both. Else it stops
    first, and jobs wait meanwhile. For what can't be, whatever stops, none does.
    """
    notes, cards, deployed = Notes(), Cards(), states()
    known: dict[str, dict[str, Any]] = notes.read(MODELS_NOTE) or {}
    nodes, gpus = [*total().values()], on_gpus(known)
    noted = {name: note | {"held_back": None} for name, note in known.items()}
    targets: dict[str, RunTarget] = {}
    refused: dict[str, InterposeError] = {}
    for spec in specs:
        state = deployed.get(spec.name)
        try:
            where = chosen(spec, cards)
            wanted = needs(where, settings, gpus=gpus)
            mark, parts = _mark(where.spec, settings, wanted), [*wanted.devices(gpus=gpus)]
            if known.get(spec.name, {}).get("mark") != mark or not _sound(state):
                if _serves(state):
                    others = _staying((other for other in specs if other is not spec), noted, deployed)
                    check_possible(wanted, nodes, others, gpus=gpus)
                copies = min(max(spec.replicas.min, state.running if state else 0), spec.replicas.max)
                targets[spec.name] = _target(where.spec, settings, wanted, copies)
            waits = None if state and state.running else _waits(wanted, nodes, gpus)
            noted[spec.name] = {"mark": mark, "parts": parts, "gpus": gpus, "held_back": waits}
        except InterposeError as error:
            refused[spec.name] = error
        except (ValueError, TypeError, ArithmeticError) as error:
            # What Ray doesn't take of one model is no reason to hold up the others.
            refused[spec.name] = ConfigError(f"Ray doesn't take what a copy of {spec.name} asks for: {error}")
        except RayError:
            raise  # the cluster's trouble, and no model's
        except Exception as error:
            # Such as a library raises of files that are as nobody foresaw.
            log.warning("%s can't be placed", spec.name, exc_info=error)
            refused[spec.name] = InternalError(
                f"where {spec.name} lies can't be planned: {type(error).__name__}: {first_line(error)}"
            )
    held = {name: refused.pop(name) for name in [*refused] if _serves(deployed.get(name))}
    for name, why in held.items():
        noted[name]["held_back"] = asdict(HeldBack(reason_of(why), why.message, served=True))
    if targets:
        # Of what Serve hasn't taken the old marks would say that it has.
        notes.write(MODELS_NOTE, noted | {name: noted[name] | {"mark": ""} for name in targets})
        serve.run_many([*targets.values()], wait_for_applications_running=False)
    if targets or noted != known:
        notes.write(MODELS_NOTE, noted)
    return Applied([*targets], refused, {name: why for name, why in held.items() if noted[name] != known[name]})


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
    for model, note in (Notes().read(MODELS_NOTE) or {}).items():
        if (app := apps.get(app_name(model))) is None:
            continue
        deployment = app.deployments.get(DEPLOYMENT)
        copies = deployment.replica_states if deployment else {}
        message = app.message or (deployment.message if deployment else "")
        found[model] = State(
            str(app.status.value),
            message,
            running=_count(copies, lambda state: state == "RUNNING"),
            begun=_count(copies, lambda state: state != "STOPPING"),
            held_back=held_back(note),
        )
    return found


def held_back(note: Mapping[str, Any]) -> HeldBack | None:
    """Of a model's note."""
    return HeldBack(**why) if (why := note.get("held_back")) else None


def _count(copies: Mapping[Any, int], counts: Callable[[Any], bool]) -> int:
    return sum(number for state, number in copies.items() if counts(state))


def _sound(state: State | None) -> bool:
    return state is not None and state.status not in ("DEPLOY_FAILED", "DELETING", "NOT_STARTED")


def _serves(state: State | None) -> bool:
    """Whether jobs are run by what is deployed, or would be. The new version may have failed beside it."""
    return _sound(state) or (state is not None and state.status == "DEPLOY_FAILED" and state.running > 0)


def _waits(wanted: Needs, nodes: Sequence[Mapping[str, float]], gpus: bool) -> dict[str, Any] | None:
    """Why a copy can only wait for other nodes."""
    try:
        check_possible(wanted, nodes, gpus=gpus)
    except ConfigError as error:
        return asdict(HeldBack(reason_of(error), error.message, served=False))
    return None


def _staying(
    specs: Iterable[ModelSpec], noted: Mapping[str, Mapping[str, Any]], deployed: Mapping[str, State]
) -> list[Parts]:
    """What copies of models take that are there, or are being started, and that never make way."""
    found: list[Parts] = []
    for spec in specs:
        if (state := deployed.get(spec.name)) is not None:
            always = max(spec.replicas.min, int(spec.pinned))
            found += [tuple(noted[spec.name]["parts"])] * min(always, state.begun)
    return found


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
