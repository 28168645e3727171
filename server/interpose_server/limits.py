"""Limits held before work is done: requests a second, and the size of a body while it arrives."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from fastapi import Request
from interpose.errors import InvalidPayload, LimitExceeded, QueueFull
from starlette.requests import ClientDisconnect


class RateLimit:
    """A bucket of tokens a user, filled at a steady rate. Of one gateway process."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, user: str) -> None:
        """Raises QueueFull with the seconds to wait."""
        now = time.monotonic()
        left, at = self._buckets.get(user, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._per_s)
        if left < 1:
            raise QueueFull(
                f"more than {self._per_s:g} requests a second; slow down",
                details={"retry_after_s": max(round((1 - left) / self._per_s, 3), 0.001)},
            )
        self._buckets[user] = (left - 1, now)


async def body_parts(request: Request, most: int, name: str) -> AsyncIterator[bytes]:
    """The body as it arrives; stops reading at the first byte over `most`.

    Raises:
        LimitExceeded: it is larger; with the figures, under the limit's `name`.
        InvalidPayload: it ended early.
    """
    announced = request.headers.get("content-length", "0")
    size = int(announced) if announced.isascii() and announced.isdigit() else 0
    seen = 0
    if size > most:
        raise _too_large(name, size, most)
    try:
        async for part in request.stream():
            seen += len(part)
            if seen > most:
                raise _too_large(name, seen, most)
            yield part
    except ClientDisconnect as error:
        raise InvalidPayload("the body ended before all of it arrived") from error


async def read_body(request: Request, most: int, name: str) -> bytes:
    """The whole body, at most `most` bytes; raises as `body_parts`."""
    return b"".join([part async for part in body_parts(request, most, name)])


def _too_large(name: str, asked: int, allowed: int) -> LimitExceeded:
    return LimitExceeded(
        f"{name}: {asked:,} or more asked for, {allowed:,} allowed",
        details={"limit": name, "asked": asked, "allowed": allowed},
    )
