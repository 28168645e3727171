"""Plans as people read them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from interpose.errors import ConfigError
from rich.console import Console
from rich.table import Table

from ..mistakes import suggestion
from .devices import GIB, Devices
from .placement import Load, Plan, PlannedShard
from .planning import figures, plan_for
from .sizes import Sizes
from .spec import ModelSpec, Placement

_WHERE = {
    Placement.DEVICE: "one device",
    Placement.DEVICES: "devices of one process",
    Placement.BLOCKS: "ranges of blocks, a process each",
}

COLUMNS = ("shard", "device", "blocks", "weights", "KV", "activations", "saves", "total", "free")
UNITS = ("number", "machine:device", "first-last", *["GiB"] * 6)

CARDS = (24, 48, 80, 141)
"""GB of the devices that are tried where nobody says which there are."""
A_MACHINE, MACHINES = 8, 4
"""Devices of each, and machines at most."""


def report(
    model: str,
    devices: str | None,
    *,
    rows: int | None,
    context: int | None,
    shards: int | None = None,
    placement: str = "auto",
    **options: Any,
) -> None:
    """Plan and print. `options`: others of a `ModelSpec`.

    Args:
        devices: as an operator states them; None for the fewest of each usual kind.

    Raises:
        ConfigError: devices or a placement that aren't understood, a model that isn't there or doesn't fit.
        ModelUnavailable: the hub doesn't give it.
    """
    there = None if devices is None else Devices.parse(devices)
    if placement not in set(Placement):
        raise ConfigError(f"no placement {placement!r}{suggestion(placement, list(Placement))}")
    spec = ModelSpec(name="planned", source=model, placement=Placement(placement), shards=shards)
    spec = spec.model_copy(update=options)
    load = _load(rows, context, figures(spec))
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 120, no_color=not terminal)
    if there is None:
        show_fewest(figures(spec), fewest(spec, load), console)
        return
    try:
        found = plan_for(spec, there, load)
    except ConfigError as error:
        if error.details.get("reason") != "too_large":
            raise
        told = f"{error.message}. Without --devices, the fewest that do are named"
        raise ConfigError(told, details=error.details) from error
    show(found, console)


def _load(rows: int | None, context: int | None, sizes: Sizes) -> Load | None:
    if rows is None and context is None:
        return None
    return Load(rows or Load.rows, context or min(Load.context, sizes.positions or Load.context))


def fewest(spec: ModelSpec, load: Load | None = None) -> dict[int, Plan | None]:
    """GB of a device -> the plan with the fewest of that kind; None where all that are tried are too few.

    Raises:
        ConfigError: it fits on none of them. As `plan_for` otherwise.
    """
    found: dict[int, Plan | None] = {}
    for card in CARDS:
        try:
            found[card] = plan_for(spec, Devices.of([[card * GIB] * A_MACHINE] * MACHINES), load)
        except ConfigError as error:
            if error.details.get("reason") != "too_large" or (card == CARDS[-1] and not any(found.values())):
                raise
            found[card] = None
    return found


def show_fewest(sizes: Sizes, plans: Mapping[int, Plan | None], console: Console) -> None:
    """A table of the fewest devices of each kind."""
    table = _table(
        f"{title(sizes)}, {gib(sizes.weights)} GiB of weights",
        ("a device", "a copy takes", "placement", "fullest holds", "has left", "a batch", "all batches"),
        ("GB", "devices", "", "GiB", "GiB", "rows x tokens", "tokens that fit"),
        left=3,
    )
    for card, plan in plans.items():
        table.add_row(f"{card}", *(_brief(plan) if plan else (f"over {A_MACHINE * MACHINES}", *["-"] * 5)))
    console.print(table)
    planned = [(card, plan) for card, plan in plans.items() if plan]
    card, plan = min(planned, key=lambda one: (one[1].nodes, len(one[1].shards), one[0]))
    machine = f"{len(plan.shards) if plan.nodes == 1 else A_MACHINE}x{card}GB"
    devices = "+".join([machine] * plan.nodes)
    for line in (
        f"The fewest of each kind, on machines of {A_MACHINE}, up to {MACHINES} of them.",
        f"What each device would hold: --devices {devices}",
        *_of_adapters(sizes),
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _brief(plan: Plan) -> tuple[str, ...]:
    fullest = min(plan.shards, key=lambda shard: shard.free)
    count = f"{plan.share:g}" if plan.share < 1 else f"{len(plan.shards)}"
    machines = f", {plan.nodes} machines" if plan.nodes > 1 else ""
    load = plan.load
    figures = (gib(fullest.total), gib(fullest.free), f"{load.rows} x {load.context:,}", f"{plan.tokens:,}")
    return f"{count}{machines}", plan.placement.value, *figures


def _table(title: str, names: Sequence[str], units: Sequence[str], *, left: int) -> Table:
    """Args: left: so many columns are of words."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, (name, unit) in enumerate(zip(names, units, strict=True)):
        table.add_column(f"{name}\n{unit}", justify="left" if index < left else "right", no_wrap=True)
    return table


def show(plan: Plan, console: Console) -> None:
    """A table of what every device holds, and what it means."""
    table = _table(title(plan.sizes), COLUMNS, UNITS, left=3)
    for row in rows(plan):
        table.add_row(*row)
    table.add_section()
    table.add_row(*totals(plan.shards))
    console.print(table)
    for line in notes(plan):
        console.print(line, highlight=False, soft_wrap=True)


def title(sizes: Sizes) -> str:
    kept = f"{sizes.quantization} and {sizes.dtype}" if sizes.quantization else sizes.dtype
    return f"{sizes.model}: {number(sizes.parameters)} parameters, {len(sizes.blocks)} blocks, {kept}"


def rows(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (_name(index, shard), shard.device.label, _blocks(shard), *_figures([shard]))
        for index, shard in enumerate(plan.shards)
    ]


def totals(shards: Sequence[PlannedShard]) -> tuple[str, ...]:
    return ("all", f"{len(shards)}", f"{sum(len(shard.blocks) for shard in shards)}", *_figures(shards))


def notes(plan: Plan) -> list[str]:
    """What the table doesn't say."""
    load, count = plan.load, len(plan.shards)
    machines = f", {plan.nodes} machines" if plan.nodes > 1 else ""
    share = f", {plan.share:g} of it" if plan.share < 1 else ""
    found = [
        f"Placement: {plan.placement.value} ({_WHERE[plan.placement]}); "
        f"{count} device{'s' * (count > 1)}{share}{machines}.",
        f"Planned for {plan.flight} batches in flight of {load.rows} row{'s' * (load.rows > 1)} of "
        f"{load.context:,} tokens each; "
        f"{plan.tokens:,} tokens in flight would fit.",
    ]
    found += _of_adapters(plan.sizes)
    if not plan.sizes.measured:
        found.append("Activations and KV are estimates: this model doesn't run without data.")
    return found


def _of_adapters(sizes: Sizes) -> list[str]:
    if not sizes.adapters:
        return []
    return [f"Of the weights {sizes.adapters / (1 << 20):,.1f} MiB are those of adapters."]


def number(count: int) -> str:
    """A count of parameters, as they are called."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:,}"


def gib(size: int) -> str:
    return f"{size / GIB:,.1f}"


def _name(index: int, shard: PlannedShard) -> str:
    return f"{index} + home" if shard.home else f"{index}"


def _blocks(shard: PlannedShard) -> str:
    return f"{shard.blocks.start}-{shard.blocks.stop - 1}" if shard.blocks else "-"


def _figures(shards: Sequence[PlannedShard]) -> tuple[str, ...]:
    names = ("weights", "cache", "work", "saves", "total", "free")
    return tuple(gib(sum(getattr(shard, name) for shard in shards)) for name in names)
