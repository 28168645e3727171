"""Which forwards a group of runs takes: what runs of one prompt have in common is computed once.

Runs of one job that are given the same differ only from the first point on that one of them writes. A sweep over
layers so becomes one run of the prompt, and forwards begun at the blocks where its runs part from that. Where runs
have only their first tokens in common, or leave them alone, later tokens are run behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile

from ..graph.model import Run
from .interpreter import Interpreter
from .plan import Plan
from .prefix import Prefix
from .restart import Restart

Member = tuple[Interpreter, int]
"""A job's run."""

ALL = math.inf

WORTH = 64
"""Runs aren't divided to save less than what a forward of so many tokens computes."""


@dataclass(frozen=True)
class Seat:
    """A run served by some rows of a forward, at the moments [since, until) of it."""

    member: Member
    since: float = -ALL
    until: float = ALL


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a forward, and the runs that they serve, which are given the same.

    Attributes:
        origin: rows of an earlier forward whose block made what these are begun with.
        kept: blocks before which what was made is kept, for rows of later forwards.
        behind: runs of a later forward that begin behind the first tokens of these rows.
    """

    seats: Sequence[Seat]
    origin: Rows | None = None
    kept: frozenset[int] = frozenset()
    behind: Sequence[Member] = ()

    @property
    def run(self) -> Run:
        """What they are rows of."""
        job, run = self.seats[0].member
        return job.plan.graph.runs[run]

    @property
    def over(self) -> bool:
        """Whether nobody needs them any more."""
        return all(seat.member[0].error is not None for seat in self.seats)


@dataclass(frozen=True)
class Stage:
    """One forward.

    Attributes:
        block: where it is begun; 0 for the inputs, one more than there are for after the last.
        skip: how many tokens of each row were computed before.
        keep: how many it computes for others, that begin behind them.
    """

    rows: Sequence[Rows]
    block: int = 0
    skip: int = 0
    keep: int = 0

    def portions(self, tokens: int) -> Iterator[Stage]:
        """The same in several forwards of at most so many tokens each, or of one run."""
        taken: list[Rows] = []
        rows = longest = 0
        for own in self.rows:
            run = own.run
            length = run.longest - self.skip
            if taken and (rows + run.rows) * max(longest, length) > tokens:
                yield replace(self, rows=taken)
                taken, rows, longest = [], 0, 0
            taken.append(own)
            rows, longest = rows + run.rows, max(longest, length)
        if taken:
            yield replace(self, rows=taken)


@dataclass
class _Family:
    """Runs of one job that are given the same, so many tokens; `depths`: for each the block it could begin at."""

    size: int
    members: list[Member] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)


def staged(group: Sequence[Member], restart: Restart, prefix: Prefix) -> list[Stage]:
    """The forwards of a group, in order."""
    whole = len({job for job, _ in group}) == len(group) or restart.loaded.split is not None
    if whole or not restart.unaltered(restart.loaded.model.modules()):
        return [Stage([Rows([Seat(member)]) for member in group])]
    behind = _behind(group, restart, prefix)
    seats = (seat for stage in behind for rows in stage.rows for seat in rows.seats)
    taken = {seat.member for seat in seats if seat.until > seat.since}
    rest = [member for member in group if member not in taken]
    return [*behind, *(_divided_by_blocks(rest, restart) if rest else ())]


def _behind(group: Sequence[Member], restart: Restart, prefix: Prefix) -> list[Stage]:
    """The forwards of runs that begin behind tokens of another, and before them those of these tokens."""
    jobs: dict[Interpreter, list[int]] = {}
    for job, run in group:
        if not _alone((job, run)):
            jobs.setdefault(job, []).append(run)
    found: dict[int, tuple[list[Rows], list[Rows]]] = {}
    for job, runs in jobs.items():
        kin = _kin(job, runs, restart, prefix) if len(runs) > 1 else None
        if kin is not None:
            size, base = kin
            bases, others = found.setdefault(size, ([], []))
            bases.append(base)
            others += [Rows([Seat(member)], origin=base) for member in base.behind]
    return [
        stage
        for size, (bases, others) in sorted(found.items())
        for stage in (Stage(bases, keep=size), Stage(others, skip=size))
    ]


def _kin(job: Interpreter, runs: Sequence[int], restart: Restart, prefix: Prefix) -> tuple[int, Rows] | None:
    """How many tokens runs of a job begin behind, and the rows that compute these; None if that isn't worth it."""
    rows = {run: _tokens(job, run) for run in runs}
    alike: dict[object, list[int]] = {}
    for run in runs:
        alike.setdefault(rows[run], []).append(run)
    base = max(alike.values(), key=len)[0]
    first, tokens = rows[base], sum(map(len, rows[base]))
    if len(runs) * tokens < WORTH or prefix.tail is None or len(set(map(len, first))) != 1:
        return None
    clear = {
        run: min(_common(rows[run], first), prefix.clear(job.plan, run))
        for run in runs
        if len(rows[run]) == len(first)
    }
    seated = [run for run in alike[first] if clear[run] and _reads(job.plan, run)]
    able = [run for run in clear if run not in seated]
    size = max(clear.values(), key=lambda size: size * sum(clear[run] >= size for run in able))
    behind = [run for run in able if size and clear[run] >= size]
    saved = len(first) * size * len(behind) - (0 if seated else tokens)
    blocks = len(restart.ends) + 1
    same = [run for run in behind if rows[run] == first] if restart.ends else []
    by_blocks = tokens * sum(min(_depth(job.plan, run, restart), blocks) for run in same) / blocks
    if saved < max(WORTH, by_blocks) or not prefix.works or saved < restart.bare_tokens:
        return None
    seats = [Seat((job, run)) for run in seated] or [Seat((job, base), until=-ALL)]
    return size, Rows(seats, behind=[(job, run) for run in behind])


def _alone(member: Member) -> bool:
    """Whether a run shares nothing with others of its job."""
    job, run = member
    return bool(job.exclusive or job.plan.backwards or job.plan.graph.runs[run].given)


def _tokens(job: Interpreter, run: int) -> tuple[tuple[int, ...], ...]:
    return tuple(row for invoke in job.plan.graph.runs[run].invokes for row in invoke.rows)


def _common(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> int:
    """How many first tokens each row has in common with its counterpart."""
    pairs = [zip(a, b, strict=False) for a, b in zip(one, other, strict=True)]
    return min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pair)) for pair in pairs)


def _reads(plan: Plan, run: int) -> bool:
    return not any(node.op == "write" for nodes in plan.at(run, 0).values() for node in nodes)


def _divided_by_blocks(group: Sequence[Member], restart: Restart) -> list[Stage]:
    """Forwards that begin at blocks, and before them one for all runs that have nothing to share."""
    families = _families(group)
    if restart.ends and any(len(family.members) > 1 for family in families):
        for family in families:
            family.depths = [_depth(job.plan, run, restart) for job, run in family.members]
    cuts = _cuts([family for family in families if len(family.members) > 1], restart)
    first: list[Rows] = []
    later: dict[int, list[Rows]] = {cut: [] for cut in cuts}
    for family in families:
        first += _divided(family, cuts, restart, later)
    return [Stage(first), *(Stage(rows, block) for block, rows in later.items() if rows)]


def _families(group: Sequence[Member]) -> list[_Family]:
    found: dict[object, _Family] = {}
    for job, run in group:
        own = job.plan.graph.runs[run]
        rows = tuple(invoke.rows for invoke in own.invokes)
        key = (job, run) if _alone((job, run)) else (job, rows)
        found.setdefault(key, _Family(own.rows * own.longest)).members.append((job, run))
    return list(found.values())


def _depth(plan: Plan, run: int, restart: Restart) -> float:
    """How many blocks a run only reads from before it writes; infinite if it only reads at all."""
    manifest = restart.loaded.manifest
    places = plan.at(run, 0)
    moments = {place: manifest.moment(*place) for place in places}
    if None in moments.values() or not all(restart.steady(module) for module, _, _ in places):
        return 0
    written = [moments[place] or 0 for place, nodes in places.items() if any(node.op == "write" for node in nodes)]
    return restart.depth(min(written)) if written else ALL


def _cuts(families: Sequence[_Family], restart: Restart) -> list[int]:
    """The blocks at which to begin, so that it costs least. A block costs its tokens, and what any forward costs.

    Begun at more blocks, less is computed twice; begun at fewer, a forward does more at a time.
    """
    blocks = len(restart.ends) + 1  # what comes after the last counts as one more
    tokens: dict[int, int] = {}
    for family in families:
        for depth in family.depths:
            if 0 < depth < ALL:
                tokens[int(depth)] = tokens.get(int(depth), 0) + family.size
    if sum(depth * size for depth, size in tokens.items()) < WORTH * blocks:
        return []
    while tokens:
        cuts = _cheapest(tokens, blocks, restart.bare_tokens)
        failed = [cut for cut in cuts if not restart.works(cut)]
        if not failed:
            return cuts
        if len(failed) == len(cuts):
            break  # then it's the model's way, and not a block's
        tokens = {depth: size for depth, size in tokens.items() if depth not in failed}
    return []


def _cheapest(tokens: Mapping[int, int], blocks: int, bare: float) -> list[int]:
    """The depths, of those that runs of so many tokens have, at which to begin."""
    depths = sorted(tokens)
    # best[i]: the least that runs of the i-th depth and deeper cost, with a cut at it, and where the next cut is.
    best: list[tuple[float, int]] = [(0.0, len(depths))] * (len(depths) + 1)
    for index in range(len(depths) - 1, -1, -1):
        left = blocks - depths[index]
        sums = enumerate(accumulate(tokens[depth] for depth in depths[index:]), index + 1)
        best[index] = min((left * (bare + together) + best[end][0], end) for end, together in sums)
    before = accumulate((tokens[depth] for depth in depths), initial=0)
    firsts = zip(range(len(depths)), before, strict=False)
    cost, index = min((blocks * whole + best[first][0], first) for first, whole in firsts)
    if cost >= blocks * (bare + sum(tokens.values())):
        return []
    cuts = []
    while index < len(depths):
        cuts.append(depths[index])
        index = best[index][1]
    return cuts


def _divided(family: _Family, cuts: Sequence[int], restart: Restart, later: Mapping[int, list[Rows]]) -> list[Rows]:
    """A family's rows in the first stage; those that begin at later blocks are added to `later`."""
    blocks = [max((cut for cut in cuts if cut <= depth), default=0) for depth in family.depths]
    sharing = [
        (member, ALL if depth == ALL else block)
        for member, block, depth in zip(family.members, blocks, family.depths, strict=False)
        if block or depth == ALL
    ]
    if len(sharing) < 2:
        return [Rows([Seat(member)]) for member in family.members]
    parted = [(member, int(block)) for member, block in sharing if block < ALL]
    ends = {block: restart.ends[block - 1] for _, block in parted}
    seats = [Seat(member, until=ALL if block == ALL else ends[int(block)]) for member, block in sharing]
    base = Rows(seats, kept=frozenset(ends))
    for member, block in parted:
        later[block].append(Rows([Seat(member, since=ends[block])], origin=base))
    taken = {member for member, _ in sharing}
    return [base, *(Rows([Seat(member)]) for member in family.members if member not in taken)]
