"""What goes wrong at one site, as it travels to another."""

from __future__ import annotations

import logging
from typing import Any

import torch
from interpose.errors import InternalError, InterposeError, InvalidPayload, from_wire

log = logging.getLogger(__name__)


def told(site: int, error: BaseException) -> dict[str, Any]:
    """An error of ours whole, running out of memory by its kind, any other as a text for the log."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return {"site": site, "memory": str(error)}
    if isinstance(error, InterposeError):
        return {"site": site, "error": error.to_wire()}
    log.error("site %d failed", site, exc_info=error)
    return {"site": site, "log": f"{type(error).__name__}: {error}"}


def raised(plain: Any) -> Exception:
    """The error that `told` told of: of the same class, or an InternalError that says nothing of the cause."""
    if not isinstance(plain, dict) or not isinstance(plain.get("site"), int):
        return InvalidPayload("a site failed and doesn't say how")
    site = plain["site"]
    if "memory" in plain:
        return torch.OutOfMemoryError(f"site {site}: {plain['memory']}")
    if isinstance(plain.get("error"), dict):
        return from_wire(plain["error"])
    log.error("site %d failed: %s", site, plain.get("log"))
    return InternalError("a part of the model failed while running this; this is our fault")
