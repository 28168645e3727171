"""The manifest of a whole model, from what its slices show. Each block is described by the slice that holds it.

What lies outside the blocks every slice has run; they must agree on it, or it isn't known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from ...errors import ConfigError
from ...graph.manifest import UNKNOWN, Layout, Leaf, ModuleInfo
from ...graph.named import Named
from .. import describe
from ..attention import READABLE
from ..named import Findings
from ..probe import Measured, moments
from .sites import block_of
from .slices import Report

Order = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Merged:
    """Attributes:
    measured: what `probe` would say of the whole model.
    found: what `named.search` would.
    revision: the whole model's.
    dtype: of its weights.
    parameters: how many there are.
    """

    measured: Measured
    found: Findings
    revision: str
    dtype: str
    parameters: int


def merged(reports: Sequence[Report]) -> Merged:
    """Put slices together. Raises ConfigError if they aren't of one model, or one could not be measured."""
    first = reports[0]
    if note := next((report.note for report in reports if report.note), ""):
        raise ConfigError(f"it can't be split: {note}")
    for report in reports:
        alike = (report.about, report.manifest.modules.keys(), report.manifest.towers, report.weights.keys())
        if alike != (first.about, first.manifest.modules.keys(), first.manifest.towers, first.weights.keys()):
            raise ConfigError("it can't be split: its parts aren't of the same model")
    owners = {block: report for report in reports for block in report.own}
    order = _order(reports, owners)
    measured = Measured(
        modules=_modules(reports, owners, order),
        blocks=first.manifest.blocks,
        attention=_attention(reports),
        rewritten=frozenset().union(*(report.rewritten for report in reports)),
        first_only=frozenset().union(*(report.first_only for report in reports)),
        towers=first.manifest.towers,
        order=order,
    )
    return Merged(measured, _found(reports, owners), _revision(reports), first.manifest.dtype, first.parameters)


def _attention(reports: Sequence[Report]) -> str:
    """Readable if it is wherever there is any."""
    said = [report.manifest.attention for report in reports]
    with_attention = [
        why
        for why, report in zip(said, reports, strict=True)
        if any("pattern" in info.points for info in report.manifest.modules.values()) or why != _NONE
    ]
    return next((why for why in with_attention if why != READABLE), READABLE if with_attention else said[0])


_NONE = "its forward comes by no attention"


def _revision(reports: Sequence[Report]) -> str:
    """As the whole model has it: the contents of each weight are told where it is."""
    marks = {
        name: (form, next((report.weights[name][1] for report in reports if report.weights[name][1]), b""))
        for name, (form, _) in reports[0].weights.items()
    }
    return describe.revision_of(reports[0].about, marks)


# -- the order of events -----------------------------------------------------------------------------------------


def _order(reports: Sequence[Report], owners: Mapping[str, Report]) -> list[tuple[str, str]]:
    """The events of a whole forward. Raises ConfigError if slices differ outside the blocks."""
    parts = {id(report): list(_parted(report.order, owners)) for report in reports}
    outlines = [[event for event, _ in parts[id(report)]] for report in reports]
    if any(outline != outlines[0] for outline in outlines):
        raise ConfigError("it can't be split: what it does outside its blocks depends on what they make")
    found: list[tuple[str, str]] = []
    for number, (event, _) in enumerate(parts[id(reports[0])]):
        owner = owners.get(event[0], reports[0])
        found += [event, *parts[id(owner)][number][1]]
    return found


def _parted(order: Order, blocks: Mapping[str, Report]) -> Iterator[tuple[tuple[str, str], Order]]:
    """Each event outside the blocks, or at the border of one, and what happens within the block after it."""
    inside: list[tuple[str, str]] = []
    last: tuple[str, str] | None = None
    for path, event in order:
        within = block_of(path, blocks)
        own = within is not None and (path != within or event not in ("enter", "exit"))
        if own:
            inside.append((path, event))
            continue
        if last is not None:
            yield last, inside
        last, inside = (path, event), []
    if last is not None:
        yield last, inside


# -- modules -----------------------------------------------------------------------------------------------------


def _modules(reports: Sequence[Report], owners: Mapping[str, Report], order: Order) -> dict[str, ModuleInfo]:
    events = moments(order)
    found: dict[str, ModuleInfo] = {}
    for path in reports[0].manifest.modules:
        block = block_of(path, owners)
        sources = [owners[block]] if block is not None else reports
        info = reduce(_agreed, (report.manifest.modules[path] for report in sources))
        kept = events.get(path, {})
        if kept.keys() != info.events.keys():
            raise ConfigError(f"it can't be split: {path or 'its forward'} does other things in some of its parts")
        found[path] = replace(info, events=kept)
    return found


def _agreed(one: ModuleInfo, other: ModuleInfo) -> ModuleInfo:
    """What two slices both say of a module outside the blocks."""
    both = [name for name in one.points if name in other.points]
    points = {name: _layout(one.points[name], other.points[name]) for name in both}
    return replace(one, points=points)


def _layout(one: Layout, other: Layout) -> Layout:
    if isinstance(one, Leaf) and isinstance(other, Leaf):
        if one.dims == other.dims and one.dtype == other.dtype:
            return replace(one, alone=one.alone or other.alone)
        return Leaf((UNKNOWN,), one.dtype)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(_layout(item, beside) for item, beside in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return {name: _layout(item, other[name]) for name, item in one.items()}
    return None


# -- named points ------------------------------------------------------------------------------------------------


def _found(reports: Sequence[Report], owners: Mapping[str, Report]) -> Findings:
    """Points of blocks by their owner; the model's own must hold in every slice, and those of other lists."""
    named: dict[str, dict[str, Named]] = defaultdict(dict)
    refused: dict[str, dict[str, str]] = defaultdict(dict)
    told = [report.manifest for report in reports]
    for owner in dict.fromkeys(owner for one in told for owner in (*one.named, *one.refused)):
        asked = [owners[owner]] if owner in owners else reports
        offered = asked[0].manifest.named.get(owner, {})
        reasons: dict[str, str] = {}
        for report in reversed(asked):
            reasons |= report.manifest.refused.get(owner, {})
        named[owner] = {name: point for name, point in offered.items() if name not in reasons}
        refused[owner] = reasons
    return Findings(named, refused)
