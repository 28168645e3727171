"""Reading what Redis answers."""

from __future__ import annotations

from typing import Any


def text(raw: Any) -> str:
    """A string answer; "" for a missing one. The client library types every answer as bytes or str."""
    return raw.decode() if isinstance(raw, bytes) else str(raw or "")
