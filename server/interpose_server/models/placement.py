"""On which devices a model lies: from its figures and theirs. Pure: no torch, no Ray.

**Which placement.** One device, if the model and the batches that are wanted fit there. Else the fewest devices on
which they fit, on one machine if there is one with as many. Two or three on one machine are held by one process
(accelerate's device map): there is nothing to set up and no hop between processes, and at most two thirds of the
devices wait for the others. From four devices on, and across machines, blocks are divided into ranges, each in a
process of its own: with a batch for each range, all devices work at a time, where a device map would let three
quarters or more of them wait.

**What must fit**, on every device, beside what libraries take (`devices.CONTEXT`, `devices.LOST`):
weights; for each batch in flight its cache; and for the one batch that a device runs at a time what its forward
makes at its worst moment, and its saves, which leave as soon as they are final: as much as one save of the output
of every block. Embedding, head and all else that is no block lie with the first range, whose device the model's own
forward (home) shares. Graphs that keep a forward for a backward, or save more, are held to what is free when they
come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from interpose.errors import ConfigError

from .devices import CONTEXT, GIB, Device, Devices
from .ranges import divided
from .sizes import Part, Sizes, widest
from .spec import ModelSpec, Placement

PIPELINE = 4
"""So many devices are kept busy by ranges of blocks rather than by one process."""

READY = 2
"""Batches in flight in one process: while one runs, the next is made ready."""

SHARE = 0.05
"""Parts of a device are given out in such steps."""

HALF = 0.5
"""What needs more than this part of a device gets all of it."""


TRIALS = ((4, 2048), (1, 2048), (1, 512))
"""Rows and context of batches that a model must have room for, where nobody says: the first that fit."""


@dataclass(frozen=True)
class Load:
    """What batches hold.

    Attributes:
        rows, context: of one batch, each row so long.
    """

    rows: int = TRIALS[0][0]
    context: int = TRIALS[0][1]

    @property
    def tokens(self) -> int:
        return self.rows * self.context


@dataclass(frozen=True)
class PlannedShard:
    """What lies on one device.

    Attributes:
        blocks: a range of the model's.
        home: whether all that is no block is here, too.
        usable: bytes of the device that the libraries of its processes leave.
        weights, cache, work, saves: bytes.
        loading: bytes it holds for a moment when it is loaded: its blocks are measured with what is no block.
        batch_tokens: of one batch, that would fit.
    """

    device: Device
    usable: int
    blocks: range
    home: bool
    weights: int
    cache: int
    work: int
    saves: int
    loading: int
    batch_tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work + self.saves

    @property
    def free(self) -> int:
        """Negative where it doesn't fit."""
        return self.usable - self.total

    @property
    def lack(self) -> int:
        """Bytes for which there is no room, at first or later."""
        return max(self.total, self.loading, self.usable) - self.usable


@dataclass(frozen=True)
class Plan:
    """Attributes:
    placement: never AUTO.
    shards: a device each. With DEVICES they are of one process.
    flight: batches that are in flight at a time.
    share: of each device, the part that is taken; less than 1 only where there is one.
    home_share: of the first device, the part that home takes, with BLOCKS.
    """

    sizes: Sizes
    load: Load
    placement: Placement
    shards: tuple[PlannedShard, ...]
    flight: int
    share: float = 1.0
    home_share: float = 0.0

    @cached_property
    def tokens(self) -> int:
        """That fit in all batches in flight together."""
        return self.flight * min(shard.batch_tokens for shard in self.shards)

    @cached_property
    def lack(self) -> int:
        """Bytes for which there is no room."""
        return sum(shard.lack for shard in self.shards)

    @property
    def fits(self) -> bool:
        return not self.lack

    @property
    def parts(self) -> tuple[float, ...]:
        """Devices of each process: part of one, several, or one for every range of blocks."""
        if self.placement is Placement.BLOCKS:
            return (1.0,) * len(self.shards)
        return (len(self.shards) * self.share,)

    @property
    def nodes(self) -> int:
        return len({shard.device.node for shard in self.shards})


_Candidate = tuple[Placement, Sequence[Device]]


def plan(sizes: Sizes, devices: Devices, spec: ModelSpec | None = None, load: Load | None = None) -> Plan:
    """Where a model lies. What its spec says of placement, devices and shards holds.

    Args:
        load: what has to fit; left out, ordinary batches, or smaller ones where those fit nowhere.

    Raises:
        ConfigError: it fits nowhere, with the numbers.
    """
    if load is not None and sizes.positions is not None and load.context > sizes.positions:
        raise ConfigError(f"{sizes.model} takes rows of at most {sizes.positions:,} tokens, not {load.context:,}")
    longest = sizes.positions or Load.context
    for wanted in [load] if load else [Load(rows, min(context, longest)) for rows, context in TRIALS]:
        best: Plan | None = None
        for placement, chosen in _candidates(sizes, devices, spec):
            found = _placed(sizes, wanted, placement, chosen)
            if found.fits:
                return found
            best = found if best is None or found.lack < best.lack else best
    raise _refusal(sizes, devices, spec, wanted, best)


def _candidates(sizes: Sizes, devices: Devices, spec: ModelSpec | None) -> Iterator[_Candidate]:
    """Placements to try, the best first."""
    wanted = spec.placement if spec else Placement.AUTO
    count = _count(spec)
    if wanted in (Placement.AUTO, Placement.DEVICE) and count in (None, 1):
        yield from ((Placement.DEVICE, [device]) for device in sorted(devices.every, key=lambda its: its.memory))
    ranged = spec is not None and spec.shards is not None
    least = 1 if wanted in (Placement.DEVICES, Placement.BLOCKS) and count == 1 else 2
    for number in range(least, len(devices.every) + 1) if count is None else [count]:
        if not least <= number <= len(sizes.blocks):
            continue
        if wanted is Placement.DEVICES or (wanted is Placement.AUTO and number < PIPELINE and not ranged):
            yield from ((Placement.DEVICES, chosen) for chosen in _together(devices, number))
        if wanted in (Placement.BLOCKS, Placement.AUTO):
            yield from ((Placement.BLOCKS, chosen) for chosen in _anywhere(devices, number))


def _count(spec: ModelSpec | None) -> int | None:
    """Devices that a spec asks for."""
    if spec is None:
        return None
    if spec.shards is not None and (spec.shards > 1 or spec.placement is Placement.BLOCKS):
        return spec.shards
    return None if spec.devices is None else max(int(spec.devices), 1)


def _together(devices: Devices, number: int) -> Iterator[Sequence[Device]]:
    """So many devices of one machine, the largest of each."""
    for node in devices.nodes:
        if len(node) >= number:
            yield sorted(node, key=lambda its: -its.memory)[:number]


def _anywhere(devices: Devices, number: int) -> Iterator[Sequence[Device]]:
    """The same, and then across machines, those with the most memory first."""
    yield from _together(devices, number)
    if all(len(node) < number for node in devices.nodes) and len(devices.every) >= number:
        nodes = sorted(devices.nodes, key=lambda node: -sum(device.memory for device in node))
        yield [device for node in nodes for device in node][:number]


def _placed(sizes: Sizes, load: Load, placement: Placement, devices: Sequence[Device]) -> Plan:
    """A model on these very devices, whether or not it fits."""
    flight = max(READY, len(devices)) if placement is Placement.BLOCKS else READY
    rooms = [device.usable for device in devices]
    ranges = division(sizes, rooms, home=True)
    if placement is Placement.BLOCKS:
        rooms[0] = max(rooms[0] - CONTEXT, 0)  # home's process is one more
    shards = tuple(
        _shard(sizes, load, flight, device, room, blocks, home=not index, alone=placement is Placement.BLOCKS)
        for index, (device, room, blocks) in enumerate(zip(devices, rooms, ranges, strict=True))
    )
    share = _share(shards[0].total, devices[0]) if placement is Placement.DEVICE else 1.0
    home_share = 0.0
    if placement is Placement.BLOCKS:
        home = sizes.outside.weights + sizes.outside.work_token * load.tokens + CONTEXT
        home_share = min(_steps(home / (devices[0].usable + CONTEXT)), HALF)
    return Plan(sizes, load, placement, shards, flight, share, home_share)


def division(sizes: Sizes, rooms: Sequence[int], *, home: bool) -> list[range]:
    """Blocks divided by their weights, to which what else they take is about in proportion.

    Args:
        rooms: bytes; only how they compare matters.
        home: whether what is no block lies with the first range.
    """
    return divided([block.weights for block in sizes.blocks], sizes.outside.weights if home else 0, rooms)


def _shard(
    sizes: Sizes, load: Load, flight: int, device: Device, room: int, blocks: range, *, home: bool, alone: bool
) -> PlannedShard:
    """`alone`: whether it is a process of its own."""
    parts = [sizes.blocks[index] for index in blocks] + ([sizes.outside] if home else [])
    weights = sum(part.weights for part in parts)
    cache = flight * sum(part.cache(load.rows, load.context) for part in parts)
    saves = sum(part.output_token for part in parts) * load.tokens
    work = widest([*parts, *_stream(sizes)]) * load.tokens
    a_token = max((cache + saves + work) / load.tokens, 1)
    fits = max(int((room - weights) / a_token), 0)
    loading = weights + (sizes.outside.weights if alone else 0)
    return PlannedShard(device, room, blocks, home, weights, cache, work, saves, loading, fits)


def _stream(sizes: Sizes) -> list[Part]:
    """The hidden states pass wherever there is no block, too."""
    return [Part(0, output_token=max((block.output_token for block in sizes.blocks), default=0))]


def _share(total: int, device: Device) -> float:
    """Of a device, for a process that holds so much, and what its libraries take."""
    share = _steps((total + CONTEXT) / (device.usable + CONTEXT))
    return share if share <= HALF else 1.0


def _steps(part: float) -> float:
    return round(max(-(-part // SHARE), 1) * SHARE, 2)


def _refusal(sizes: Sizes, devices: Devices, spec: ModelSpec | None, load: Load, best: Plan | None) -> ConfigError:
    usable = sum(device.usable for device in devices.every)
    about = (
        f"{sizes.model} has {_gib(sizes.weights)} of weights in {sizes.quantization or sizes.dtype}; with batches "
        f"of {load.rows} rows of {load.context:,} tokens it"
    )
    asked = f" as {_asked(spec)}" if spec and _asked(spec) else ""
    on = f"{asked} on {devices}, {_gib(usable)} of it usable"
    details = {"reason": "too_large", "weights": sizes.weights, "usable": usable}
    if best is None:
        raise _unplaced(sizes, devices, spec)
    worst = max(best.shards, key=lambda shard: shard.lack)
    return ConfigError(
        f"{about} doesn't fit{on}. At best a device of {_gib(worst.usable)} has to hold "
        f"{_gib(worst.total)}: {_gib(worst.weights)} of weights, {_gib(worst.cache)} of cache, "
        f"{_gib(worst.work)} of activations and {_gib(worst.saves)} of saves{_at_first(worst)}. "
        f"{_remedy(best)}",
        details=details,
    )


def unranged(model: str, blocks: int, ranges: int) -> ConfigError:
    """What is said where more ranges are asked for than there are blocks."""
    told = f"{model} has {blocks} block{'s' * (blocks != 1)}, which can't be {ranges} ranges"
    return ConfigError(told, details={"reason": "misconfigured"})


def _unplaced(sizes: Sizes, devices: Devices, spec: ModelSpec | None) -> ConfigError:
    """Why there is nothing even to try."""
    count = _count(spec) or 2
    if count > len(sizes.blocks):
        return unranged(sizes.model, len(sizes.blocks), count)
    if spec and spec.placement is Placement.DEVICE:
        return ConfigError(f"placement device is one device, not {count}", details={"reason": "misconfigured"})
    asked = f"{sizes.model} can't be placed as {_asked(spec)} on {devices}" if spec else sizes.model
    lack = f"that takes {count} devices, and there are {len(devices.every)}"
    if len(devices.every) >= count:
        lack = f"no machine has {count}"
    return ConfigError(f"{asked}: {lack}", details={"reason": "too_large"})


def _at_first(shard: PlannedShard) -> str:
    if shard.loading <= max(shard.total, shard.usable):
        return ""
    return f", and {_gib(shard.loading)} while it is loaded"


def _remedy(best: Plan) -> str:
    room = min(shard.batch_tokens for shard in best.shards)
    smaller = f"Batches of {room:,} tokens would fit; for larger ones give" if room else "Give"
    return f"{smaller} it more devices or a smaller dtype"


def _asked(spec: ModelSpec) -> str:
    found = [f"placement {spec.placement.value}"] if spec.placement is not Placement.AUTO else []
    found += [f"{spec.devices:g} devices"] if spec.devices is not None else []
    found += [f"{spec.shards} shards"] if spec.shards is not None else []
    return ", ".join(found)


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
