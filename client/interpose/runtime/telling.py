"""Values as lines of a log."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch

MOST_TOLD = 16
"""Items of one nest that a log line shows."""


def told(value: Any) -> str:
    """A value as text: small tensors whole, large ones by their shape."""
    if isinstance(value, torch.Tensor):
        return repr(value.detach().cpu()) if value.numel() <= 64 else f"tensor{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {told(value[key])}' for key in islice(value, MOST_TOLD))}}}"
    if isinstance(value, (tuple, list)):
        more = ", ..." if len(value) > MOST_TOLD else ""
        return f"({', '.join(map(told, value[:MOST_TOLD]))}{more})"
    return str(value)
