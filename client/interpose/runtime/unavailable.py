"""Why a model doesn't come from where it lies, in a word: what a library raised, sorted by its kind."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (GatedRepoError, "gated"),
    (LocalEntryNotFoundError, "network"),  # it isn't in the cache, and the hub couldn't be asked
    (RepositoryNotFoundError, "missing"),
    (RevisionNotFoundError, "missing"),
    (EntryNotFoundError, "missing"),
    (OfflineModeIsEnabled, "network"),
    (httpx.TransportError, "network"),
    (torch.OutOfMemoryError, "memory"),
    (MemoryError, "memory"),
    (ConnectionError, "network"),
    (TimeoutError, "network"),
)
"""The first that fits counts: some are kinds of others."""


def reason(error: BaseException) -> str | None:
    """ "gated", "missing", "network" or "memory"; None for anything else."""
    causes = list(_causes(error))
    for kind, word in _KINDS:
        if any(isinstance(cause, kind) for cause in causes):
            return word
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code if cause.response is not None else 0
            return "gated" if status in (401, 403) else "missing" if status in (404, 410) else "network"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the first cause last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
