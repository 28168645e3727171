"""A forward whose blocks lie on shards, as home runs it: it gives each shard its part of the jobs on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from ...errors import InternalError
from ..forward import Enough, Forward, Placed
from ..interpreter import Interpreter
from ..loading import Loaded
from .away import Away
from .letters import by_job
from .placeholders import settled
from .route import HOME, Landing, Mail, Nest


def forward_of(loaded: Loaded) -> type[Forward]:
    """What runs forwards of a model."""
    return Forward if loaded.split is None else Carried


class Carried(Forward):
    """A `Carrier`: the visitor of home's hooks that serves shards as well."""

    def __init__(self, loaded: Loaded, placed: Sequence[Placed], *args: Any, **kwargs: Any) -> None:
        super().__init__(loaded, placed, *args, **kwargs)
        assert loaded.split is not None
        self._last = loaded.split.last
        self._at = self._next = HOME
        """The shard that was visited last, and the last that will be before home has its turn."""
        self._visited: set[int] = set()
        self._far = [(part, away_of(part.job).far(part.run, part.step)) for part in placed]
        self._jobs = {away_of(part.job).number: part.job for part in placed}

    @property
    def over(self) -> bool:
        return super().over and not self._beyond(self._at)

    def _beyond(self, site: int) -> bool:
        """Whether any job has something to do at a later shard."""
        return any(max(sites, default=HOME) > site for part, sites in self._far if part.job.error is None)

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        return super().visit(module, event, call, settled(value))

    # -- forward -----------------------------------------------------------------------------------------------

    def reach(self) -> int:
        for part, _ in self._far:
            with part.job.guard():
                if part.job.error is None:
                    part.job.check_wanted()
        live = [(part, sites) for part, sites in self._far if part.job.error is None]
        stops = [site for part, _ in live for site in away_of(part.job).stops(part.run, part.step, self._at)]
        last = (
            self._last if not super().over else max((max(sites, default=HOME) for _, sites in live), default=HOME)
        )
        self._next = min([*stops, last])
        return self._next

    def load(self, site: int) -> tuple[Nest, Sequence[Mail]]:
        parts = [part for part, sites in self._far if site in sites and part.job.error is None]
        if not parts:
            return None, ()
        if site in self._visited:
            raise InternalError(f"a forward came by shard {site} twice, and its jobs' graphs can't be divided so")
        self._visited.add(site)
        jobs = dict.fromkeys(part.job for part in parts)
        work = {
            "whole": astuple(self.whole),
            "through": site < self._next or not super().over or self._beyond(site) or self._stops(site),
            "jobs": [told for job in jobs if (told := away_of(job).told(site)) is not None],
            "parts": [_part(part) for part in parts],
        }
        return work, [one for job in jobs for one in away_of(job).mail(site)]

    def _stops(self, site: int) -> bool:
        return any(site in away_of(part.job).stops(part.run, part.step, site - 1) for part, _ in self._far)

    def landed(self, landing: Landing) -> None:
        self.serving = True
        self._at = self._next
        self._take(landing)
        if landing.hidden is None or self.over:
            raise Enough
        self.serving = False

    def _take(self, landing: Landing, *, backward: bool = False) -> None:
        for reply in landing.replies.values():
            for told in reply or ():
                away_of(self._jobs[told["number"]]).hear(told)
        for number, mail in by_job(landing.mail).items():
            job = self._jobs[number]
            away_of(job).receive(mail, job.plan.upstream if backward else None)

    # -- backward ----------------------------------------------------------------------------------------------

    def wave(self, site: int) -> tuple[Nest, Sequence[Mail]]:
        work, mail = [], []
        for number, job in self._jobs.items():
            away = away_of(job)
            asked = [pair for pair in job.gradients.active if away.division.site[pair[0]] == site]
            if asked and job.error is None:
                work.append({"number": number, "asked": asked})
                mail += away.mail(site)
        return work or None, mail

    def ebbed(self, landing: Landing) -> None:
        self._take(landing, backward=True)


def away_of(job: Interpreter) -> Away:
    assert job.away is not None, "jobs of a split model have a part on shards"
    return job.away


def _part(part: Placed) -> Nest:
    return {
        "number": away_of(part.job).number,
        "run": part.run,
        "step": part.step,
        "span": astuple(part.span),
        "invokes": [astuple(invoke) for invoke in part.invokes],
        "since": part.since,
        "until": part.until,
        "ended": part.job.absences.ended(part.run),
    }
