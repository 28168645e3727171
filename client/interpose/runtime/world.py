"""What a graph may reach of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..graph.manifest import Manifest
from .adapters import Adapter


@dataclass(frozen=True, slots=True)
class World:
    """What a graph may reach of the model."""

    modules: Mapping[str, nn.Module]
    device: torch.device
    manifest: Manifest
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
