"""What blocks remember is put back on their shards as at home."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpose.runtime.split.remembering import Remembered
from splitting import split
from torch import Tensor, nn


class Counting(nn.Module):
    """Adds how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden * self.scale + self.calls


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Counting() for _ in range(4)])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("independent", [True, False])
@torch.no_grad()
def test_counters_on_shards(independent: bool) -> None:
    with split(Counts(), 2) as parts:
        parts.home(torch.zeros(1, 3))
        manifest = SimpleNamespace(row_independent=independent)
        loaded: Any = SimpleNamespace(model=parts.home, split=SimpleNamespace(route=parts.route), manifest=manifest)
        first = Remembered(loaded)

        def total() -> float:
            return float(parts.home(torch.zeros(1, 3))[0, 0])

        with first:
            assert total() == 8
            inner = Remembered(loaded)
            assert total() == 12
            inner.restore()
            assert total() == (16 if independent else 12)
            inner.forget()
        assert total() == (20 if independent else 8)
        first.forget()
        assert not any(stop.station._held for stop in parts.route._stops.values())  # type: ignore[attr-defined]
