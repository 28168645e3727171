"""How many copies Serve keeps of a model: what is decided from the broker's figures, not from requests.

Serve carries this file over to its controller by value; all that lasts is in `watch`, which it imports there.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

from .watch import watch


class Policy:
    """Args: least: so many while nothing is known of the broker."""

    def __init__(self, model: str, least: int) -> None:
        self._model = model
        self._least = least

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        wanted = watch().wanted(self._model)
        if wanted is None:
            wanted = max(context.target_num_replicas, self._least)
        return wanted, {}
