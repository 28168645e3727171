"""What a place where jobs run can do. Remote, local and recorded transports are interchangeable behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from ..wire.stream import Happening
from ..wire.submission import Submission
from ..wire.tensors import Encoded


class Transport(Protocol):
    """All of it runs on one event loop, the process's own in the background (see `loop`)."""

    async def submit(self, job: Submission, attachments: Mapping[str, Encoded]) -> None:
        """Hand a job in; on return it is accepted and will end, whatever becomes of this process.

        Args:
            job: its own `attachments` are empty; the transport moves those given beside it as it sees fit.
            attachments: content id -> tensor, for all that the graph names.

        Raises:
            InterposeError: it wasn't accepted. Calling again with the same id is the same job.
        """
        ...

    def follow(self, job: str) -> AsyncGenerator[Happening, None]:
        """What happens to a job from its beginning on, through its terminal `Changed`, where it stops.

        Raises:
            InterposeError: the job can't be followed (any longer). That it failed is no such error.
        """
        ...

    async def cancel(self, job: str) -> None:
        """Ask for its end. Cancelling a job that has ended changes nothing."""
        ...

    async def release(self, job: str) -> None:
        """Everything was received: the result need not be kept."""
        ...

    async def close(self) -> None: ...
