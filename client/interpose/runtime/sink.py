"""Where a job's values go while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Sink(Protocol):
    """Where a job's values go, and what stops it. Called on the engine's thread."""

    def save(self, node: int, value: Any) -> None:
        """A saved value, final: a nest of tensors and plain scalars that nothing changes any more."""

    def log(self, node: int, text: str) -> None:
        """A line the user asked to see."""

    def tokens(self, run: int, step: int, ids: Sequence[int | None]) -> None:
        """The new token of each row of a generation; None where a row had ended. Asked for by `stream`."""

    def cancelled(self) -> bool:
        """Whether to give up; asked before every node. May raise the error to end with."""
