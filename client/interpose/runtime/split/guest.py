"""The jobs' graphs on a shard: each job's part of its graph runs here, served by hooks of the shard's blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import InternalError, JobTimeout
from ...graph.codec import decode_graph
from ...graph.limits import Limits
from ..forward import Forward, Placed
from ..interpreter import Interpreter
from ..loading import Loaded
from ..prepared import Preparation
from ..rows import Span
from ..world import World
from .calling import CALL, PARAMETER, Elsewhere, Owned
from .letters import by_job, deliver, error_to_nest, letters, of_spent, spent_letters
from .route import Mail, Nest
from .sites import Division, Sites, divide
from .station import way


class Exit(Protocol):
    """How saved values leave a shard."""

    def leave(self, address: Nest, node: int, value: Any) -> Nest:
        """Have a value leave. `address`: what the job's sink at home calls itself. Returns what home is told."""

    def stored(self, token: int) -> Nest:
        """Whether what left by itself has arrived, and how."""


class ByHome:
    """Values leave by way of home."""

    def leave(self, address: Nest, node: int, value: Any) -> Nest:
        return {"value": value}

    def stored(self, token: int) -> Nest:
        raise InternalError("nothing leaves from here")


class _Outlet:
    """Where the values of one job's part go."""

    def __init__(self, address: Nest, limits: Limits, exit_: Exit) -> None:
        self.saves: list[tuple[int, Nest]] = []
        self.logs: list[tuple[int, str]] = []
        self._address = address
        self._limits = limits
        self._exit = exit_
        self._until = float("inf")

    def start(self) -> None:
        """No turn on this shard takes longer than the whole job may."""
        self._until = time.monotonic() + self._limits.wall_s

    def save(self, node: int, value: Any) -> None:
        self.saves.append((node, self._exit.leave(self._address, node, value)))

    def log(self, node: int, text: str) -> None:
        self.logs.append((node, text))

    def tokens(self, run: int, step: int, ids: Sequence[int | None]) -> None:
        raise AssertionError("tokens are chosen at home")

    def cancelled(self) -> bool:
        if time.monotonic() > self._until:
            raise JobTimeout(
                f"the job ran for more than {self._limits.wall_s:g} s", details={"allowed_s": self._limits.wall_s}
            )
        return False


class Part:
    """One job's part on this shard."""

    def __init__(self, site: int, number: int, job: Interpreter, outlet: _Outlet, division: Division) -> None:
        self.site = site
        self.number = number
        self.job = job
        self._outlet = outlet
        self._sent = division.sent.get(site, {})
        self._others = division.used - {site}
        self._told: set[int] = set()

    def start(self) -> None:
        self._outlet.start()

    def mail(self) -> list[Mail]:
        return letters(self.job, self.number, self._sent)

    def onward(self, *, back: bool) -> list[Mail]:
        """What the job has used by now, for the shards to which a forward, or a backward, may come from here."""
        sites = (site for site in self._others if (site < self.site) is back)
        return spent_letters(self.job, self.number, sites)

    def report(self) -> Nest:
        """What home hasn't heard yet."""
        outlet, job = self._outlet, self.job
        saves, outlet.saves = outlet.saves, []
        logs, outlet.logs = outlet.logs, []
        reached = job.gradients.reached - self._told
        self._told |= reached
        return {
            "number": self.number,
            "site": self.site,
            "saves": saves,
            "logs": logs,
            "reached": sorted(reached),
            "spent": self.job.spent.told,
            "error": error_to_nest(job.error),
            "doubtful": job.doubtful,
        }


class Graphs:
    """A shard's `Guest`.

    Args:
        loaded: this shard's modules, and the manifest of the whole model.
        sites: where the modules of the model are.
        exit_: how saves leave from this shard.
    """

    def __init__(self, loaded: Loaded, sites: Sites, site: int, exit_: Exit | None = None) -> None:
        self._loaded = loaded
        self._sites = sites
        self._site = site
        self._exit = exit_ or ByHome()
        self._prepare = Preparation(loaded.manifest)
        device = torch.device(loaded.device)
        far = Elsewhere(sites, site, way)
        self._world = World(loaded.modules, device, loaded.manifest, loaded.adapters, far)
        own = {path: module for path, module in loaded.modules.items() if sites.of(path) == site}
        self._owned = Owned(own, loaded)
        self._parts: dict[int, Part] = {}
        self._early: dict[int, list[Mail]] = {}
        """Mail of jobs that have nothing to do here yet."""

    # -- forwards ----------------------------------------------------------------------------------------------

    def visit(
        self, work: Nest, mail: Sequence[Mail], run: Callable[[], Tensor]
    ) -> tuple[Tensor | None, Nest, Sequence[Mail]]:
        if work is None:
            hidden: Tensor | None = run()
            return hidden, *self._answers(self._deliver(self._heard(mail)))
        try:
            return self._serve(work, mail, run)
        except BaseException:
            # They end with this forward: whoever is run again begins anew, under another number.
            self._over({"numbers": [told["number"] for told in work["jobs"]]})
            raise

    def _serve(
        self, work: Nest, mail: Sequence[Mail], run: Callable[[], Tensor]
    ) -> tuple[Tensor | None, Nest, Sequence[Mail]]:
        """Run the blocks with the jobs' graphs around them."""
        mail = self._begin_all(work["jobs"], mail)
        placed = [self._placed(part) for part in work["parts"]]
        parts = [self._parts[part["number"]] for part in work["parts"]]
        for own, part in zip(placed, work["parts"], strict=True):
            if part["ended"] is not None:
                own.job.begin_step(own.run, own.step, part["ended"])
        others = self._deliver(mail)
        forward = Forward(self._loaded, placed, Span(*work["whole"]), complete=work["through"])
        hidden = forward.serve(run)
        forward.finish()
        return hidden, *self._answers([*parts, *others])

    def _placed(self, part: Nest) -> Placed:
        own = self._parts[part["number"]]
        own.start()
        invokes = tuple(Span(*invoke) for invoke in part["invokes"])
        return Placed(
            own.job, part["run"], Span(*part["span"]), invokes, part["step"], part["since"], part["until"]
        )

    def _deliver(self, mail: Sequence[Mail], *, backward: bool = False) -> list[Part]:
        """Give jobs what came for them; that of jobs not yet known here waits. Returns who got something."""
        found = []
        for number, letters_ in by_job(mail).items():
            part = self._parts.get(number)
            if part is None:
                self._early.setdefault(number, []).extend(letters_)
                continue
            found.append(part)
            for one in letters_:
                deliver(part.job, one, part.job.plan.upstream if backward else None)
        return found

    def _heard(self, mail: Sequence[Mail]) -> list[Mail]:
        """Note what jobs have used elsewhere. Returns the other mail."""
        for one in filter(of_spent, mail):
            # A job that begins here only later is told of it then.
            if (part := self._parts.get(one.address[0])) is not None:
                part.job.spent.learn(one.value)
        return [one for one in mail if not of_spent(one)]

    def _answers(self, parts: Sequence[Part], *, back: bool = False) -> tuple[Nest, Sequence[Mail]]:
        own = list(dict.fromkeys(parts))
        mail = [one for part in own for one in (*part.mail(), *part.onward(back=back))]
        return [part.report() for part in own], mail

    # -- backwards ---------------------------------------------------------------------------------------------

    def wave(self, work: Nest, mail: Sequence[Mail], run: Callable[[], None]) -> tuple[Nest, Sequence[Mail]]:
        mail = self._heard(mail)
        asked = [(self._parts[told["number"]], told["asked"]) for told in work or ()]
        for part, pairs in asked:
            part.start()
            part.job.gradients.active = dict(pairs)
        parts = [part for part, _ in asked]
        parts += [part for part in self._deliver(mail, backward=True) if part not in parts]
        try:
            run()
        finally:
            for part in parts:
                part.job.gradients.ebb()
                part.job.gradients.active = {}  # the next backward may come by without asking for anything here
        for part in parts:
            with part.job.guard():
                if part.job.error is None:
                    part.job.go_on()
        return self._answers(parts, back=True)

    # -- beside forwards ---------------------------------------------------------------------------------------

    def errand(self, name: str, request: Nest) -> Nest:
        work: Mapping[str, Callable[[Nest], Nest]] = {
            "begin": self._begun,
            "end_run": self._end_run,
            "settle": self._settle,
            "over": self._over,
            "stored": lambda request: self._exit.stored(request["token"]),
        }
        if name in (CALL, PARAMETER):
            return self._owned.errand(name, request)
        if name not in work:
            raise InternalError(f"a shard knows no errand {name!r}")
        with torch.no_grad():
            return work[name](request)

    def _begin_all(self, jobs: Sequence[Nest], mail: Sequence[Mail]) -> list[Mail]:
        """Begin jobs that are new here, with what the mail says they have used. Returns the other mail."""
        new = [self._known(told) for told in jobs]
        mail = self._heard(mail)
        for part in new:
            self._begin(part)
        return mail

    def _known(self, told: Nest) -> Part:
        graph = decode_graph(told["graph"])
        limits = Limits(**told["limits"])
        # Its parameters are this shard's own business, its attachments come by mail.
        plan, report, _ = self._prepare(graph, {}, limits, told["owner"], None)
        division = divide(plan, self._sites)
        outlet = _Outlet(told["address"], limits, self._exit)
        job = Interpreter(
            plan, report.known, {}, outlet, limits, self._world, set(told["gone"]), {},
            exclusive=told["exclusive"], own=division.part(self._site), site=self._site,
        )  # fmt: skip
        job.spent.learn(told["spent"])
        part = self._parts[told["number"]] = Part(self._site, told["number"], job, outlet, division)
        return part

    def _begin(self, part: Part) -> None:
        part.start()
        part.job.begin()
        self._deliver(self._early.pop(part.number, ()))

    def _begun(self, told: Nest) -> Nest:
        part = self._known(told)
        self._begin(part)
        return self._answer(part)

    def _end_run(self, request: Nest) -> Nest:
        part = self._parts[request["number"]]
        part.job.end_run(request["run"])
        return self._answer(part)

    def _settle(self, request: Nest) -> Nest:
        mail = [Mail(self._site, (number, node), value) for number, node, value in request["mail"]]
        self._deliver(self._begin_all(request["jobs"], mail))
        return [self._answer(self._parts[number]) for number in request["numbers"]]

    def _answer(self, part: Part) -> Nest:
        return {
            "mail": [(one.to, one.address[1], one.value) for one in part.mail()],
            "told": part.report(),
        }

    def _over(self, request: Nest) -> Nest:
        for number in request["numbers"]:
            self._early.pop(number, None)
            part = self._parts.pop(number, None)
            if part is not None:
                part.job.gradients.close()
        return None
