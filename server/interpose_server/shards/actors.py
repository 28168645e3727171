"""A copy of a model with its blocks on several actors of Ray: the replica is home, each shard an actor by it."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from interpose.errors import ConfigError, ReplicaLost, first_line
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from .. import logs
from ..models.spec import ModelSpec
from ..settings import Settings
from .placing import ENV

log = logging.getLogger(__name__)


class ShardActor:
    """The actor: one range of a model's blocks. Its process ends when home does."""

    def stand(
        self,
        site: int,
        secret: bytes,
        spec: Mapping[str, Any],
        settings: Mapping[str, Any],
        own: Sequence[str],
        blocks: Sequence[str],
    ) -> tuple[str, int]:
        """Load, and listen. Returns where.

        What fails here is raised where it was asked for, with its reason; what fails while an actor is made isn't.

        Args:
            spec, settings: as plain data.
            own, blocks: paths of its blocks, and of all.
        """
        # Torch is for shards alone: who deploys them has no need of it.
        from ..blobs import open_blobs
        from ..worker.hosting import prepare_process
        from .outgoing import Outgoing
        from .process import stand

        wanted = ModelSpec.model_validate(spec)
        logs.setup(f"shard {site} of {wanted.name}")
        chosen = Settings(**settings).changed(wanted.settings)
        prepare_process(chosen)
        self._standing = stand(
            site,
            secret,
            wanted.place,
            own,
            blocks,
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            device="cpu" if wanted.devices == 0 else None,
            dtype=wanted.dtype,
            revision=wanted.revision,
            quantization=wanted.quantization,
            exit_=Outgoing(open_blobs(chosen), chosen),
        )
        threading.Thread(target=self._end, name="end", daemon=True).start()
        return self._standing.address

    def _end(self) -> None:
        self._standing.wait()
        # Threads under way would hold up an orderly exit, and nobody is left to hear of them.
        os._exit(0)


def split_engine(spec: ModelSpec, settings: Settings, device: str | None = None) -> Any:
    """`engines.engine_for` of a model in block ranges.

    To be called in a replica, which has a part of the first bundle of its placement group. The first shard has the
    rest of that, and each other shard a bundle.

    Raises:
        ConfigError: it can't be split, or not so.
        ModelUnavailable: its weights don't come.
        ReplicaLost: a shard died meanwhile.
    """
    from interpose.runtime.split.building import commit_of

    from ..models.planning import ranges
    from ..worker.engines import ready
    from .assembly import assemble

    group = ray.util.get_current_placement_group()
    if group is None:
        raise ConfigError(f"{spec.name}: its copy was given no place for shards")
    places = _places(group.bundle_specs, ray.get_runtime_context().get_assigned_resources())  # type: ignore[no-untyped-call]
    # One commit for all parts, whatever is pushed to the hub while they load.
    spec = spec.model_copy(update={"revision": commit_of(spec.place, spec.revision)})
    parts = ranges(spec, len(places), home="GPU" in places[0])
    blocks = [path for own in parts for path in own]
    secret = secrets.token_bytes(32)
    # A shard has no business with the broker, whose password Ray needn't carry about.
    plain = spec.model_dump(mode="json"), settings.model_dump(mode="json", exclude={"redis_url"})
    shards = [_placed(group, index, place).remote() for index, place in enumerate(places)]
    try:
        asked = [
            shard.stand.remote(site, secret, *plain, own, blocks)
            for site, (shard, own) in enumerate(zip(shards, parts, strict=True), 1)
        ]
        addresses = dict(enumerate(_got(asked), 1))
        home = assemble(
            spec.name,
            spec.place,
            secret,
            addresses,
            parts,
            device=device or ("cpu" if spec.devices == 0 else None),
            dtype=spec.dtype,
            revision=spec.revision,
            quantization=spec.quantization,
            adapters=spec.adapters,
        )
        made = ready(home.loaded, settings, room=home.free_bytes(), lanes=len(places) + 1)
    except BaseException:
        for shard in shards:
            ray.kill(shard)
        raise
    # Ray ends an actor of whom nobody holds a handle.
    return replace(made, check=partial(_check, home.link, shards))


def _check(link: Any, shards: Sequence[Any]) -> None:
    link.check()


def _places(bundles: Sequence[Mapping[str, float]], taken: Mapping[str, float]) -> list[Mapping[str, float]]:
    """What each shard has of the bundles, of the first what the replica leaves."""
    first = {name: amount - taken.get(name, 0.0) for name, amount in bundles[0].items()}
    return [{name: amount for name, amount in first.items() if amount > 0}, *bundles[1:]]


def _placed(group: Any, bundle: int, needs: Mapping[str, float]) -> Any:
    """The actor's class, to be made in a bundle."""
    return ray.remote(ShardActor).options(
        num_cpus=needs.get("CPU", 0),
        num_gpus=needs.get("GPU", 0),
        resources={name: amount for name, amount in needs.items() if name not in ("CPU", "GPU")},
        max_restarts=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        runtime_env={"env_vars": ENV},
    )


def _got(asked: Sequence[Any]) -> list[Any]:
    """What actors answer. Raises what one of them raised, its death as ReplicaLost."""
    try:
        found: list[Any] = ray.get([*asked])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayActorError as error:
        raise ReplicaLost(f"a shard died while it was loading: {first_line(error)}") from error
    return found
