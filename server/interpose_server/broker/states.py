"""The states of a model and of its copies, and the ways between them, which the broker's scripts check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum


class ModelState(StrEnum):
    COLD = "cold"
    """On no device; it is loaded when somebody asks for it."""
    LOADING = "loading"
    READY = "ready"
    """Hot: it runs jobs."""
    DRAINING = "draining"
    """It finishes what it has and takes no more."""
    FAILED = "failed"
    """It couldn't be loaded."""
    STOPPED = "stopped"
    """Nobody has heard of it for a while, and nobody would load it."""


_S = ModelState

TRANSITIONS: Mapping[ModelState, frozenset[ModelState]] = {
    _S.COLD: frozenset({_S.LOADING, _S.FAILED, _S.STOPPED}),
    _S.LOADING: frozenset({_S.LOADING, _S.READY, _S.DRAINING, _S.FAILED, _S.STOPPED}),
    _S.READY: frozenset({_S.LOADING, _S.READY, _S.DRAINING, _S.FAILED, _S.STOPPED}),
    _S.DRAINING: frozenset({_S.LOADING, _S.DRAINING, _S.FAILED, _S.STOPPED}),
    _S.FAILED: frozenset({_S.LOADING, _S.FAILED, _S.STOPPED}),
    _S.STOPPED: frozenset({_S.LOADING, _S.STOPPED}),
}
"""What a copy may say next. To loading from anywhere: a process of the same name begins anew. Not from draining to
ready: what was told to go doesn't come back."""


def derive(copies: Iterable[ModelState], *, wanted: bool, failed: bool, removed: bool = False) -> ModelState:
    """A model's state from those of its copies that live.

    Args:
        wanted: it is in the catalogue, so that it is loaded when somebody asks.
        failed: the last try to load it failed.
        removed: it is being taken out of the catalogue, and finishes what it has.
    """
    if removed:
        return _S.DRAINING
    held = set(copies)
    for state in (_S.READY, _S.LOADING, _S.DRAINING):
        if state in held:
            return state
    if failed:
        return _S.FAILED
    return _S.COLD if wanted else _S.STOPPED
