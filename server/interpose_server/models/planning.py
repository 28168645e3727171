"""The plan of a model of the catalogue."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from .devices import Devices
from .placement import Load, Plan, division, plan, unranged
from .sizes import Sizes
from .spec import ModelSpec


def plan_for(spec: ModelSpec, devices: Devices, load: Load | None = None) -> Plan:
    """Where a model lies. Reads its config, from the hub if need be, and takes seconds where the model is large.

    Raises:
        ConfigError: a model that isn't there or not understood, or that fits nowhere.
        ModelUnavailable: the hub doesn't give it.
    """
    return plan(figures(spec), devices, spec, load)


def ranges(spec: ModelSpec, shards: int, *, home: bool) -> tuple[tuple[str, ...], ...]:
    """Paths of the blocks of each range, the ranges as alike in bytes as can be: a plan's, on devices of one size.

    Args:
        home: whether what is no block lies with the first range, which then has fewer blocks. Not so where home has
            a processor of its own.

    Raises:
        ConfigError: there are not so many blocks. As `plan_for` otherwise.
        ModelUnavailable: the hub doesn't give it.
    """
    sizes = figures(spec)
    if not 1 <= shards <= len(sizes.blocks):
        raise unranged(spec.name, len(sizes.blocks), shards)
    found = division(sizes, [1] * shards, home=home)
    names = [f"{sizes.path}.{index}" if sizes.path else f"{index}" for index in range(len(sizes.blocks))]
    return tuple(tuple(names[index] for index in its) for its in found)


def figures(spec: ModelSpec) -> Sizes:
    """A model's sizes. Raises as `plan_for`."""
    name = None if spec.source else spec.name
    adapters = tuple((adapter, place, _stamp(place)) for adapter, place in sorted(spec.adapters.items()))
    return _figures(spec.place, name, spec.dtype, spec.revision, spec.quantization, _stamp(spec.place), adapters)


@lru_cache(maxsize=256)
def _figures(
    place: str,
    name: str | None,
    dtype: str,
    revision: str | None,
    quantization: str | None,
    stamp: float,
    adapters: tuple[tuple[str, str, float], ...],
) -> Sizes:
    """`stamp`, also of each adapter: of the file that was read."""
    from .sizing import sizes  # torch and transformers, which take seconds and memory

    sources = {adapter: place for adapter, place, _ in adapters}
    return sizes(place, name=name, dtype=dtype, revision=revision, quantization=quantization, adapters=sources)


def _stamp(place: str) -> float:
    """When a folder's config, a model's or an adapter's, was written; 0 for what is no folder."""
    path = Path(place).expanduser()
    files = [path / name for name in ("config.json", "adapter_config.json")] if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)
