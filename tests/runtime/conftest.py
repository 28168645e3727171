"""What tests of the engine's forwards share."""

from __future__ import annotations

import pytest
from interpose.runtime import stages
from interpose.runtime.restart import Restart


@pytest.fixture
def eager_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards cost what their tokens cost, as those of large batches do: each block is worth beginning at."""
    monkeypatch.setattr(Restart, "bare_tokens", 0.0)
    monkeypatch.setattr(stages, "WORTH", 0)
