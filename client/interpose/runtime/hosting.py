"""Generations and the jobs that come meanwhile: who joins, who has a pause between two steps, who is left over."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InterposeError
from .generation import Begun
from .interpreter import Interpreter
from .pieces import pieces

if TYPE_CHECKING:
    from .engine import Breaks, Company, Engine, EngineJob


class Hosting:
    """The jobs of one hosted generation: which run is whose."""

    def __init__(self, engine: Engine, company: Company) -> None:
        self._engine = engine
        self._company = company
        self._jobs: dict[Interpreter, EngineJob] = {}
        self._left: list[EngineJob] = []
        self._adapter: tuple[str | None] | None = None
        """What all of them chose, once the first has begun."""

    @property
    def left(self) -> list[EngineJob]:
        """Jobs whose end nobody was told."""
        return [*self._left, *self._jobs.values()]

    def begin(self, jobs: Sequence[EngineJob]) -> list[Begun]:
        begun: list[Begun] = []
        ahead = deque(jobs)
        try:
            while ahead:
                job = ahead[0]
                started = self._engine.start(job)
                if isinstance(started, InterposeError):
                    self._company.ended(job, started)
                elif started.error is not None or started.plan.idle(0):
                    self._engine.close([started])
                    self._company.ended(job, started.error)
                elif self._by_itself(started):
                    self._engine.close([started])
                    self._left.append(job)
                else:
                    self._adapter = (started.plan.graph.runs[0].adapter,)
                    self._jobs[started] = job
                    begun.append((started, 0, pieces(started.plan.graph.runs[0], job.attachments)))
                ahead.popleft()
        finally:
            self._left += ahead  # none is lost where one finds no memory to begin with
        return begun

    def _by_itself(self, job: Interpreter) -> bool:
        """Whether a job can't stand beside others."""
        # Rows that come and go are padded on the left.
        padded = bool(self._engine.manifest.even_rows)
        run = job.plan.graph.runs[0]
        other = self._adapter not in (None, (run.adapter,))
        return padded or job.exclusive or other or bool(run.given)

    def pause(self, *, joinable: bool) -> None:
        self._engine.rest(self._company, joinable=joinable and not self._left)

    def arrivals(self) -> list[Begun]:
        """Nobody once some wait for the end, or it might never come."""
        return [] if self._left else self.begin(self._company.arrivals())

    def refused(self, begun: Sequence[Begun]) -> None:
        jobs = [job for job, _, _ in begun if job in self._jobs]
        self._engine.close(jobs)
        self._left += map(self._jobs.pop, jobs)

    def close(self) -> None:
        """No more comes of those whose end nobody was told."""
        self._engine.close([*self._jobs])

    def ended(self, job: Interpreter) -> None:
        self._engine.finish([job])
        self._company.ended(self._jobs.pop(job), job.error)


@dataclass(frozen=True)
class Resting:
    """The guests of a generation that nobody joins: breaks between its steps."""

    engine: Engine
    breaks: Breaks

    def pause(self, *, joinable: bool) -> None:
        self.engine.rest(self.breaks)

    def arrivals(self) -> Sequence[Begun]:
        return ()

    def refused(self, begun: Sequence[Begun]) -> None:
        """Nobody came."""

    def ended(self, job: Interpreter) -> None:
        """It is told of with the others of its batch."""
