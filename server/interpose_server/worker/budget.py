"""What batches of a model may hold: as measured, unless an operator says otherwise."""

from __future__ import annotations

from typing import Any

from ..settings import Settings
from .cost import Cost
from .measure import LENGTH, Measured
from .scheduler import Budget

MOST_TOKENS = 16_384
"""Of a forward, where none was measured beyond which more gain nothing."""


ROWS = 8
"""So many short rows a forward may always hold: on a machine too slow for `batch_s`, or slow just while it was
measured, jobs go on sharing forwards."""

MEMORY_BYTES = 8 << 30


def budget(measured: Measured, settings: Settings, *, shared: bool) -> Budget:
    """`shared`: whether jobs of this model may share forwards at all."""
    cost = measured.cost
    return Budget(
        jobs=settings.batch_jobs if shared else 1,
        rows=settings.batch_rows,
        tokens=settings.batch_tokens or measured.tokens or MOST_TOKENS,
        memory_bytes=settings.batch_memory_bytes or measured.memory_bytes,
        seconds=max(settings.batch_s, ROWS * cost.forward(LENGTH), ROWS * cost.step(1)),
        cost=cost,
    )


def unmeasured(settings: Settings, *, shared: bool) -> Budget:
    """The same where nothing is known of the model's speed, and all that is free isn't."""
    return budget(Measured(None, MEMORY_BYTES, Cost()), settings, shared=shared)


def told(allowed: Budget, measured: Measured) -> dict[str, Any]:
    """For the status page and `GET /v1/models`."""
    return {
        "forward_tokens": allowed.most,
        "batch_jobs": allowed.jobs,
        "batch_rows": allowed.rows,
        "batch_mb": allowed.memory_bytes >> 20,
        "batch_s": allowed.seconds,
        "measured": measured.to_plain(),
    }


def describe(allowed: Budget, measured: Measured) -> str:
    """One line for the log."""
    cost = allowed.cost
    took = f"; measured in {measured.took_s:.1f} s" if measured.took_s else "; not measured"
    return (
        f"up to {allowed.most:,} tokens a forward ({_time(cost.forward(allowed.most))}; one row of 16 "
        f"{_time(cost.forward(16))}, a step of a generation {_time(cost.step(1))}), "
        f"{allowed.memory_bytes / 2**30:.1f} GB a batch{took}"
    )


def _time(seconds: float) -> str:
    """As "57 ms", "0.18 s"."""
    return f"{seconds * 1e3:.2g} ms" if seconds < 0.0995 else f"{seconds:.2g} s"
