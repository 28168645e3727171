"""What a graph may reach of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..graph.limits import Limits
from ..graph.manifest import Manifest
from .adapters import Adapter


class Elsewhere(Protocol):
    """The part of a split model that isn't at this site."""

    def has(self, path: str) -> bool:
        """Whether a module is there."""

    def parameter(self, path: str, name: str, adapter: str | None) -> tuple[Any, bool]:
        """A parameter of its modules in a run with an adapter, brought here, and whether that has made it."""

    def call(self, path: str, value: Any, limits: Limits, adapter: str | None) -> Any:
        """What one of its modules returns in a run with an adapter, one tensor; gradients come by."""


@dataclass(frozen=True, slots=True)
class World:
    """What a graph may reach of the model.

    Attributes:
        elsewhere: of a split model, what is at other sites; None for a whole one.
    """

    modules: Mapping[str, nn.Module]
    device: torch.device
    manifest: Manifest
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None
