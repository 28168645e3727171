"""Where a job's values go while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable


class Sink(Protocol):
    """Where a job's values go, and what stops it. Called on the engine's thread."""

    def save(self, node: int, value: Any) -> None:
        """A saved value, final: a nest of tensors and plain scalars that nothing changes any more.

        One that raises hasn't taken it: an attempt that follows brings it again.
        """

    def log(self, node: int, text: str) -> None:
        """A line the user asked to see."""

    def tokens(self, run: int, step: int, ids: Sequence[int | None]) -> None:
        """The new token of each row of a generation; None where a row had ended. Asked for by `stream`."""

    def cancelled(self) -> bool:
        """Whether to give up; asked before every node. May raise the error to end with."""


@runtime_checkable
class Adopting(Protocol):
    """A sink whose job's values may leave from shards by themselves.

    Attributes:
        address: what a shard must know for that: a nest of plain values.
    """

    address: Any

    def adopt(self, node: int, saved: Any, stored: Callable[[int], Any]) -> None:
        """A value is on its way; `stored(saved["token"])` tells whether it has arrived, asked again and again."""
