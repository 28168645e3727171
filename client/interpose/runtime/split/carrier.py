"""A forward whose blocks lie on shards, as home runs it: it gives each shard its part of the jobs on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any
from weakref import WeakValueDictionary

from ..forward import Enough, Forward, Placed
from ..interpreter import Interpreter
from ..loading import Loaded
from .away import Away
from .letters import by_job
from .placeholders import settled
from .route import Landing, Mail, Nest, Waves


def forward_of(loaded: Loaded) -> type[Forward]:
    """What runs forwards of a model."""
    return Forward if loaded.split is None else Carried


class Carried(Forward):
    """A `Carrier`: the visitor of home's hooks that serves shards as well."""

    def __init__(self, loaded: Loaded, placed: Sequence[Placed], *args: Any, **kwargs: Any) -> None:
        super().__init__(loaded, placed, *args, **kwargs)
        assert loaded.split is not None
        self._sites = loaded.split.sites
        self._last = loaded.split.last
        self._at = self._next = 0
        """The block that was called last, and the last that will be before home has its turn; by number."""
        self._visited: set[int] = set()
        self._far = [(part, away_of(part.job).far(part.run, part.step)) for part in placed]
        """The blocks at which each part has something to do."""
        self._jobs = {away_of(part.job).number: part.job for part in placed}

    @property
    def over(self) -> bool:
        return super().over and not self._beyond(self._at)

    def _live(self) -> list[tuple[Placed, set[int]]]:
        return [(part, blocks) for part, blocks in self._far if part.job.error is None]

    def _beyond(self, block: int) -> bool:
        """Whether any job has something to do at a later block."""
        return any(max(blocks, default=0) > block for _, blocks in self._live())

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        return super().visit(module, event, call, settled(value))

    # -- forward -----------------------------------------------------------------------------------------------

    def reach(self) -> int:
        for part, _ in self._far:
            with part.job.guard():
                if part.job.error is None:
                    part.job.check_wanted()
        live = self._live()
        last = self._last
        if super().over:
            last = max((max(blocks, default=0) for _, blocks in live), default=0)
        self._next = min([*self._stops(self._at), last])
        return self._next

    def _stops(self, after: int) -> list[int]:
        """The blocks beyond one behind which home has something to do."""
        return [block for part, _ in self._live() for block in away_of(part.job).stops(part.run, part.step, after)]

    def load(self, site: int) -> tuple[Nest, Sequence[Mail]]:
        own = [
            block
            for block in self._sites.numbers.values()
            if self._at < block <= self._next and self._sites.at(block) == site
        ]
        parts = [part for part, blocks in self._live() if not blocks.isdisjoint(own)]
        if not parts:
            return None, ()
        jobs = dict.fromkeys(part.job for part in parts)
        # A shard is visited twice where home has its turn between two of its blocks.
        since, until = self._sites.end(own[0] - 1), self._sites.end(own[-1])
        whole = all(self._sites.at(block) != site for block in (own[0] - 1, own[-1] + 1))
        again = site in self._visited
        self._visited.add(site)
        work = {
            "whole": astuple(self.whole),
            "through": not super().over or self._beyond(own[-1]) or own[-1] in self._stops(own[-1] - 1),
            "jobs": [told for job in jobs if (told := away_of(job).told(site)) is not None],
            "parts": [_part(part, None if whole else (since, until), again=again) for part in parts],
        }
        return work, [one for job in jobs for one in away_of(job).mail(site)]

    def landed(self, landing: Landing) -> None:
        self.serving = True
        self._at = self._next
        _take(self._jobs, landing)
        if landing.hidden is None or self.over:
            raise Enough
        self.serving = False

    @property
    def waves(self) -> Waves:
        return _Waves(self._jobs)


class _Waves:
    """The jobs' backwards. Whoever runs one has the jobs."""

    def __init__(self, jobs: Mapping[int, Interpreter]) -> None:
        self._jobs = WeakValueDictionary(jobs)

    def wave(self, site: int) -> tuple[Nest, Sequence[Mail]]:
        work, mail = [], []
        for number, job in self._jobs.items():
            away = away_of(job)
            asked = [pair for pair in job.gradients.active.items() if away.division.site[pair[0]] == site]
            if asked and job.error is None:
                work.append({"number": number, "asked": asked})
                mail += away.mail(site)
        return work or None, mail

    def ebbed(self, landing: Landing) -> None:
        _take(self._jobs, landing, backward=True)


def _take(jobs: Mapping[int, Interpreter], landing: Landing, *, backward: bool = False) -> None:
    """Give jobs what shards have sent and say of them."""
    for reply in landing.replies.values():
        for told in reply or ():
            away_of(jobs[told["number"]]).hear(told)
    for number, mail in by_job(landing.mail).items():
        job = jobs[number]
        away_of(job).receive(mail, job.plan.upstream if backward else None)


def away_of(job: Interpreter) -> Away:
    """What of a job runs on shards."""
    assert job.away is not None, "jobs of a split model have a part on shards"
    return job.away


def _part(part: Placed, moments: tuple[float, float] | None, *, again: bool) -> Nest:
    """Args: moments: between which it is served on this visit, if not all the time; again: it was begun before."""
    since, until = moments or (part.since, part.until)
    return {
        "number": away_of(part.job).number,
        "run": part.run,
        "step": part.step,
        "span": astuple(part.span),
        "invokes": [astuple(invoke) for invoke in part.invokes],
        "since": since,
        "until": until,
        "ended": None if again else part.job.absences.ended(part.run),
    }
