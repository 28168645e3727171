"""What of a job runs on shards, as home sees it: what it is told there, the mail it waits for, what comes of it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ...errors import InternalError
from ...graph.codec import encode_graph
from ..failures import located
from .letters import deliver, error_from_nest, letters, of_spent, spent_letters
from .route import HOME, Mail, Nest, Route
from .sites import EVERY, Division, Split

if TYPE_CHECKING:
    from ...graph.model import Graph, Node
    from ..interpreter import Interpreter

_NUMBERS = itertools.count(1)


class Away:
    """One job's part on shards.

    Args:
        graph: the job's own; the plan's may have other names for what is attached.

    Attributes:
        number: its name among the sites.
        begun: the shards that know of it.
    """

    def __init__(self, job: Interpreter, graph: Graph, split: Split, division: Division, owner: str) -> None:
        self.number = next(_NUMBERS)
        self.division = division
        self._job = job
        self._graph = graph
        self._route = split.route
        self._sites = split.sites
        self._owner = owner
        self.begun: set[int] = set()
        self._outbox: dict[int, list[Mail]] = {}

    def begin(self) -> None:
        """Have the shards run what needs nothing of any forward."""
        for site in sorted(self.division.first):
            self._errand(site, "begin", self.told(site))

    def told(self, site: int) -> Nest:
        """What a shard must know of the job, if it doesn't yet."""
        if site in self.begun:
            return None
        self.begun.add(site)
        job = self._job
        return {
            "number": self.number,
            "graph": self._encoded,
            "limits": job.limits.as_dict(),
            "owner": self._owner,
            "exclusive": job.exclusive,
            "gone": sorted(job.saves.gone),
            "spent": job.spent.told,
            "address": getattr(job.sink, "address", None),
        }

    @cached_property
    def _encoded(self) -> Nest:
        names = {name: hashlib.sha256(name.encode()).hexdigest() for name in self._graph.attachments}
        return encode_graph(self._graph.renamed(names))

    def mail(self, site: int) -> list[Mail]:
        """What waits to be sent to a shard."""
        self._collect()
        return [*self._outbox.pop(site, ()), *spent_letters(self._job, self.number, [site])]

    def _collect(self) -> None:
        for one in letters(self._job, self.number, self.division.sent.get(HOME, {})):
            self._outbox.setdefault(one.to, []).append(one)

    def receive(self, mail: Sequence[Mail], only: frozenset[int] | None = None) -> None:
        """Mail that came home: for this job here, or to be sent on."""
        for one in mail:
            if one.to == HOME:
                deliver(self._job, one, only)
            elif not of_spent(one):  # of that home hears by reports
                self._outbox.setdefault(one.to, []).append(one)

    def hear(self, told: Nest) -> None:
        """What a shard reports: saves, lines of the log, how it failed."""
        job, nodes = self._job, self._job.nodes
        job.spent.learn(told["spent"])
        job.gradients.reached.update(told["reached"])
        with job.guard():
            for node, text in told["logs"]:
                job.saves.tell(nodes[node], text)
            for node, saved in told["saves"]:
                self._adopt(nodes[node], saved, told["site"])
        error = error_from_nest(told["error"], nodes)
        if told["doubtful"]:
            job.doubt()
        elif error is not None:
            job.fail(error)

    def _adopt(self, node: Node, saved: Nest, site: int) -> None:
        try:
            self._job.saves.adopt(node, saved, partial(self._stored, site))
        except Exception as error:
            raise located(error, node) from error

    def _stored(self, site: int, token: int) -> Any:
        return self._route.errand(site, "stored", {"token": token})

    def end_run(self, run: int) -> None:
        """Have the shards hand out what they gathered over the steps of a run."""
        plan = self._job.plan
        saves = (
            node.id for node in plan.nodes("save") if node.run == run and plan.template_of(node.id) is not None
        )
        for site in sorted({self.division.site[node] for node in saves} - {HOME}):
            if site in self.begun:
                self._errand(site, "end_run", {"number": self.number, "run": run})

    def check(self) -> None:
        """Nothing is under way any more. A save that is missing fails the job: silence would pass for an answer."""
        if self._job.error is None and (missing := self._job.saves.missing(self._job.plan)):
            first = missing[0]
            self._job.fail(
                InternalError(f"{len(missing)} of its saves were never made").at(first.id, first.op, first.source)
            )

    @property
    def sites(self) -> frozenset[int]:
        """The shards that know of the job, or have mail for it."""
        return self.division.used

    @property
    def waiting(self) -> frozenset[int]:
        """The shards for which mail waits."""
        self._collect()
        return frozenset(self._outbox) if self._job.error is None else frozenset()

    @property
    def over(self) -> bool:
        return self._job.error is not None

    def stops(self, run: int, step: int, after: int) -> list[int]:
        """The blocks beyond `after` behind which home has something to do in one step of a run."""
        return [
            block for own, at, block in self.division.stops if own == run and at in (step, EVERY) and block > after
        ]

    def far(self, run: int, step: int) -> set[int]:
        """The blocks with reads or writes of one step of a run."""
        return {block for module, _, _ in self._job.plan.at(run, step) if (block := self._sites.block(module))}

    def _errand(self, site: int, name: str, request: Nest) -> None:
        self.answer(self._route.errand(site, name, request))

    def answer(self, reply: Nest) -> None:
        """A shard's word of the job."""
        self.receive([Mail(to, (self.number, node), value) for to, node, value in reply["mail"]])
        self.hear(reply["told"])


def settle(jobs: Sequence[Away], route: Route) -> None:
    """No forward comes any more: deliver what is under way, and hear what shards still have to say."""
    asked = set[int]().union(*(job.begun for job in jobs))
    while sites := sorted(asked | set[int]().union(*(job.waiting for job in jobs))):
        for site in sites:
            own = [job for job in jobs if not job.over and (site in job.begun or site in job.waiting)]
            request = {
                "jobs": [told for job in own if (told := job.told(site)) is not None],
                "mail": [(*one.address, one.value) for job in own for one in job.mail(site)],
                "numbers": [job.number for job in own],
            }
            for job, reply in zip(own, route.errand(site, "settle", request) if own else (), strict=True):
                job.answer(reply)
        asked = set()
    for job in jobs:
        job.check()


def over(jobs: Sequence[Away], route: Route) -> None:
    """The shards may forget jobs."""
    for site in sorted(set[int]().union(*(job.sites for job in jobs))):
        route.errand(site, "over", {"numbers": [job.number for job in jobs if site in job.sites]})
