"""Adapters of a split model: each process has the layers of its own modules, and tries its own blocks' points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import ConfigError, InvalidPayload
from ...graph.adapters import AdapterInfo, decode_adapters, encode_adapters
from .. import lora, named
from ..adapters import Adapter
from ..loading import Loaded, offering_adapter
from ..named import Refused
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
        info: of the whole adapter; `refused` is left empty.
        refused: points that don't hold with it, of those that this slice could try.
    """

    own: Sequence[str]
    info: AdapterInfo
    refused: Refused

    def to_nest(self) -> Nest:
        return {
            "own": [*self.own],
            "info": encode_adapters({"": self.info}),
            "points": {owner: dict(reasons) for owner, reasons in self.refused.points.items()},
            "written": {owner: dict(reasons) for owner, reasons in self.refused.written.items()},
        }

    @classmethod
    def of_nest(cls, nest: Nest) -> Fitted:
        """Raises InvalidPayload."""
        try:
            info = decode_adapters(nest["info"])[""]
            return cls(tuple(nest["own"]), info, Refused(nest["points"], nest["written"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidPayload(f"a malformed report of an adapter: {error!r}") from error


def on_slice(
    loaded: Loaded, own: Sequence[str], outputs: Mapping[str, Nest], sources: Mapping[str, str]
) -> tuple[dict[str, Adapter], dict[str, Fitted]]:
    """Load adapters on a slice, and try its named points with each.

    Args:
        loaded: the slice, with the whole model's manifest; its own blocks and all outside of blocks are real.
        outputs: path of every block -> what it returns, as `shard.output_kind` says.
        sources: name -> folder or hub id.

    Returns:
        Of each the layers of the slice's own blocks, and what is to be said of it.

    Raises:
        ConfigError, ModelUnavailable: as `lora.load`.
    """
    absent = {path: loaded.modules[path] for path in outputs if path not in own}
    within = inside(own)
    adapters, found = {}, {}
    with passing(absent, outputs):
        for name, source in sources.items():
            adapter = lora.load(loaded.model, name, source, keep=outside(absent))
            loaded = offering_adapter(loaded, name, adapter)
            found[name] = Fitted(own, adapter.info, named.refused_with(loaded, name, absent))
            its = {module: layer for module, layer in adapter.layers.items() if within(f"{loaded.names[module]}.")}
            adapters[name] = replace(adapter, layers=its)
    return adapters, found


def at_home(loaded: Loaded, dispatcher: Dispatcher, name: str, source: str) -> Adapter:
    """An adapter's layers of what lies outside the blocks. Raises ConfigError, ModelUnavailable."""
    with unstubbed(loaded.model, dispatcher):
        return lora.load(loaded.model, name, source, keep=outside(dispatcher.blocks))


def offering(loaded: Loaded, name: str, adapter: Adapter, slices: Sequence[Fitted]) -> Loaded:
    """Home with an adapter that its shards have loaded.

    Raises ConfigError: they have loaded others.
    """
    if any(one.info != adapter.info for one in slices):
        raise ConfigError(f"adapter {name!r} isn't the same wherever this model's parts have read it")
    info = replace(adapter.info, refused=_refused(loaded, slices))
    return offering_adapter(loaded, name, replace(adapter, info=info))


def _refused(loaded: Loaded, slices: Sequence[Fitted]) -> dict[str, dict[str, str]]:
    """Of a block's points its owner decides, and whoever has the first of its kind; others must hold everywhere."""
    owners = {path: one.refused for one in slices for path in one.own}
    found: dict[str, dict[str, str]] = {}

    def take(owner: str, reasons: Mapping[str, str]) -> None:
        for point, reason in reasons.items():
            found.setdefault(owner, {}).setdefault(point, reason)

    for owner in loaded.manifest.named:
        for refused in [owners[owner]] if owner in owners else [one.refused for one in slices]:
            take(owner, refused.points.get(owner, {}))
    for first, *others in named.alike(loaded.manifest):
        for owner in others if first in owners else ():
            take(owner, owners[first].written.get(first, {}))
    return found
