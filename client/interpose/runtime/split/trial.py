"""Whether a model runs with its blocks elsewhere: tried at load, so that nobody's job finds out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, InternalError, ReplicaLost, first_line
from ..transformers_internals import collected

_STATES = "hidden_states"


def uncollected() -> None:
    """Raises InternalError where the library is about to collect what modules within blocks return."""
    lost = [key for key in collected() or () if not key.startswith("_") and key != _STATES]
    if lost:
        raise InternalError(
            f"a split model doesn't collect its blocks' {', '.join(lost)}; read them by hook points"
        )


def tried(home: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
    """Run a split model's home as it will be run: each batch, the first also with gradients, and a few tokens on.

    Args:
        batches: keyword arguments of forwards.

    Raises:
        ConfigError: the model can't be split, and why.
    """
    model: Any = home
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        with torch.enable_grad():
            model(**batches[0])
        if hasattr(model, "can_generate") and model.can_generate():
            for batch in batches:
                model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    except ReplicaLost:
        raise
    except Exception as error:  # whatever its code raises when parts of it aren't there
        raise ConfigError(
            f"{type(home).__name__} can't be split over several sites: {first_line(error)}"
        ) from error
