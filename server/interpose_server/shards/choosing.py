"""Where a copy of a model lies, for those whose spec leaves that to their size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..models.devices import Devices
from ..models.planning import plan_for
from ..models.spec import ModelSpec, Placement


@dataclass(frozen=True, slots=True)
class Chosen:
    """Attributes:
    spec: with its placement, devices and shards said.
    home_share: of the first device of a copy in parts, what all that is no block takes.
    """

    spec: ModelSpec
    home_share: float = 0.0


HOME_SHARE = 0.2
"""Where nobody has planned."""


def chosen(spec: ModelSpec, cards: Callable[[ModelSpec], Devices | None]) -> Chosen:
    """Args:
        cards: the GPUs of the cluster; None where there are none. Asked only where a model's size has to say on
            which it lies.

    Raises:
        ConfigError: it fits nowhere, or can't be planned.
        ModelUnavailable: the hub doesn't give its config.
    """
    if _said(spec) or (devices := cards(spec)) is None:
        return Chosen(_defaults(spec), HOME_SHARE)
    plan = plan_for(spec, devices)
    several = plan.placement is Placement.BLOCKS
    said = {"placement": plan.placement, "devices": plan.parts[0], "shards": len(plan.shards) if several else None}
    return Chosen(spec.model_copy(update=said), plan.home_share)


def _said(spec: ModelSpec) -> bool:
    """Whether it leaves nothing to choose."""
    return spec.shards is not None if spec.in_blocks else spec.devices is not None


def _defaults(spec: ModelSpec) -> ModelSpec:
    said = {"devices": 1.0 if spec.devices is None else spec.devices}
    if spec.in_blocks:
        parts = spec.shards or max(int(said["devices"]), 2)
        return spec.model_copy(update=said | {"placement": Placement.BLOCKS, "shards": parts})
    kind = Placement.DEVICES if said["devices"] > 1 else Placement.DEVICE
    return spec.model_copy(
        update=said | {"placement": kind if spec.placement is Placement.AUTO else spec.placement}
    )
