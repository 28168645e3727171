"""Plans as people read them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from interpose.errors import ConfigError
from rich.console import Console
from rich.table import Table

from .devices import GIB, Devices
from .placement import Load, Plan, Shard
from .planning import figures, plan_for
from .sizes import Sizes
from .spec import ModelSpec, Placement

_WHERE = {
    Placement.DEVICE: "one device",
    Placement.DEVICES: "devices of one process",
    Placement.BLOCKS: "ranges of blocks, a process each",
}

COLUMNS = ("shard", "device", "blocks", "weights", "KV", "activations", "saves", "total", "free")


def report(
    model: str,
    devices: str,
    *,
    rows: int | None,
    context: int | None,
    shards: int | None = None,
    placement: str = "auto",
    **options: str | None,
) -> None:
    """Plan and print. `options`: others of a `ModelSpec`.

    Raises:
        ConfigError: devices or a placement that aren't understood, a model that isn't there or doesn't fit.
        ModelUnavailable: the hub doesn't give it.
    """
    there = Devices.parse(devices)
    if placement not in set(Placement):
        raise ConfigError(f"no placement {placement!r}; there are {', '.join(Placement)}")
    spec = ModelSpec(name="planned", source=model, placement=Placement(placement), shards=shards)
    spec = spec.model_copy(update=options)
    found = plan_for(spec, there, _load(rows, context, figures(spec)))
    terminal = sys.stdout.isatty()
    show(found, Console(width=None if terminal else 120, no_color=not terminal))


def _load(rows: int | None, context: int | None, sizes: Sizes) -> Load | None:
    if rows is None and context is None:
        return None
    return Load(rows or Load.rows, context or min(Load.context, sizes.positions or Load.context))


def show(plan: Plan, console: Console) -> None:
    """A table of what every device holds, in GiB, and what it means."""
    table = Table(title=title(plan), title_justify="left", title_style="bold")
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index < 3 else "right", no_wrap=True)
    for row in rows(plan):
        table.add_row(*row)
    table.add_section()
    table.add_row(*totals(plan.shards))
    console.print(table)
    for line in notes(plan):
        console.print(line, highlight=False, soft_wrap=True)


def title(plan: Plan) -> str:
    sizes = plan.sizes
    kept = f"{sizes.quantization} and {sizes.dtype}" if sizes.quantization else sizes.dtype
    return f"{sizes.model}: {number(sizes.parameters)} parameters, {len(sizes.blocks)} blocks, {kept}"


def rows(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (_name(index, shard), shard.device.label, _blocks(shard), *_figures([shard]))
        for index, shard in enumerate(plan.shards)
    ]


def totals(shards: Sequence[Shard]) -> tuple[str, ...]:
    return ("all", f"{len(shards)}", f"{sum(len(shard.blocks) for shard in shards)}", *_figures(shards))


def notes(plan: Plan) -> list[str]:
    """What the table doesn't say."""
    load, count = plan.load, len(plan.shards)
    machines = f", {plan.nodes} machines" if plan.nodes > 1 else ""
    share = f", {plan.share:g} of it" if plan.share < 1 else ""
    found = [
        f"Placement: {plan.placement.value} ({_WHERE[plan.placement]}); "
        f"{count} device{'s' * (count > 1)}{share}{machines}.",
        f"Planned for {plan.flight} batches in flight of {load.rows} rows of {load.context:,} tokens each; "
        f"{plan.tokens:,} tokens in flight would fit.",
    ]
    if not plan.sizes.measured:
        found.append("Activations and KV are estimates: this model doesn't run without data.")
    return found


def number(count: int) -> str:
    """A count of parameters, as they are called."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:,}"


def gib(size: int) -> str:
    return f"{size / GIB:,.1f}"


def _name(index: int, shard: Shard) -> str:
    return f"{index} + home" if shard.home else f"{index}"


def _blocks(shard: Shard) -> str:
    return f"{shard.blocks.start}-{shard.blocks.stop - 1}" if shard.blocks else "-"


def _figures(shards: Sequence[Shard]) -> tuple[str, ...]:
    names = ("weights", "cache", "work", "saves", "total", "free")
    return tuple(gib(sum(getattr(shard, name) for shard in shards)) for name in names)
