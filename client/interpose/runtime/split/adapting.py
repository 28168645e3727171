"""Adapters of a split model: each process has the layers of its own modules, and tries its own blocks' points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import ConfigError
from ...graph.adapters import AdapterInfo
from .. import lora
from ..adapters import Adapter
from ..loading import Loaded, offering_adapter, with_adapters
from ..partial_loading import inside, outside
from .building import unstubbed
from .route import Nest
from .slices import passing
from .stubs import Dispatcher


@dataclass(frozen=True)
class Fitted:
    """What one slice says of an adapter.

    Attributes:
        own: paths of its blocks.
        info: of the whole adapter, but that `refused` is about what this slice could try.
    """

    own: Sequence[str]
    info: AdapterInfo


def on_slice(
    loaded: Loaded, own: Sequence[str], outputs: Mapping[str, Nest], sources: Mapping[str, str]
) -> Mapping[str, Adapter]:
    """Load adapters on a slice, and try its named points with each.

    Args:
        loaded: the slice, with the whole model's manifest; its own blocks and all outside of blocks are real.
        outputs: path of every block -> what it returns, as `shard.output_kind` says.
        sources: name -> folder or hub id.

    Returns:
        Of each the layers of the slice's own blocks.

    Raises:
        ConfigError, ModelUnavailable: as `lora.load`.
    """
    absent = {path: loaded.modules[path] for path in outputs if path not in own}
    with passing(absent, outputs):
        found = with_adapters(loaded, sources, absent=absent).adapters
    within = inside(own)
    paths = {module: f"{path}.weight" for path, module in loaded.modules.items()}
    return {
        name: replace(
            adapter, layers={module: layer for module, layer in adapter.layers.items() if within(paths[module])}
        )
        for name, adapter in found.items()
    }


def at_home(loaded: Loaded, dispatcher: Dispatcher, name: str, source: str) -> Adapter:
    """An adapter's layers of what lies outside the blocks. Raises ConfigError, ModelUnavailable."""
    with unstubbed(loaded.model, dispatcher):
        return lora.load(loaded.model, name, source, keep=outside(dispatcher.blocks))


def offering(loaded: Loaded, name: str, adapter: Adapter, slices: Sequence[Fitted]) -> Loaded:
    """Home with an adapter that its shards have loaded.

    Raises ConfigError: they have loaded others.
    """
    if any(replace(one.info, refused={}) != adapter.info for one in slices):
        raise ConfigError(f"adapter {name!r} isn't the same wherever this model's parts have read it")
    return offering_adapter(
        loaded, name, replace(adapter, info=replace(adapter.info, refused=_refused(loaded, slices)))
    )


def _refused(loaded: Loaded, slices: Sequence[Fitted]) -> dict[str, dict[str, str]]:
    """Of a block's points its owner decides; others must hold in every slice. In the manifest's order."""
    owners = {path: one for one in slices for path in one.own}
    found: dict[str, dict[str, str]] = {}
    for owner in loaded.manifest.named:
        for one in [owners[owner]] if owner in owners else slices:
            for point, reason in one.info.refused.get(owner, {}).items():
                found.setdefault(owner, {}).setdefault(point, reason)
    return found
