"""A model whose blocks lie on shards: its home, put together from shards that listen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from interpose.graph.manifest import encode_manifest
from interpose.runtime.adapter_files import pinned
from interpose.runtime.inputs import Feeding
from interpose.runtime.loading import Loaded, tokenizer_of
from interpose.runtime.sources import Source, torch_device
from interpose.runtime.split.adapting import Fitted, at_home, offering
from interpose.runtime.split.building import load_home
from interpose.runtime.split.calling import answer
from interpose.runtime.split.measuring import measure_split
from interpose.runtime.split.route import Nest, Route
from interpose.runtime.split.slices import Report, feeding_nest
from interpose.runtime.split.stubs import Dispatcher

from .link import Address, Link
from .loaded_shard import ADAPT, FREE, MEASURE, SERVE


@dataclass(frozen=True, eq=False)
class SplitModel:
    """Attributes:
    loaded: the model, ready for an engine.
    link: the way to its shards.
    """

    loaded: Loaded
    link: Link

    def free_bytes(self) -> int:
        """Of the shards' memory, what the fullest has left."""
        return int(min(self.link.errand(site, FREE, None) for site in set(self.link.sites.values())))


def assemble(
    name: str,
    source: str,
    secret: bytes,
    addresses: Mapping[int, Address],
    parts: Sequence[Sequence[str]],
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    quantization: str | None = None,
    adapters: Mapping[str, str] | None = None,
    **timing: float,
) -> SplitModel:
    """Load home's part of a model, and have all of it measured.

    Args:
        name: what the model is served as.
        addresses: site -> where its shard listens.
        parts: of each site from 1 on, the paths of its blocks.
        adapters: name -> folder that every site sees, or hub id, of LoRA weights that runs may choose.
        timing: as of `Link`.

    Raises:
        ConfigError: it can't be split, or not so; an adapter isn't one of this model's.
        ReplicaLost: a shard is gone.
        ModelUnavailable: the hub doesn't give it.
    """
    sites = {path: site for site, own in enumerate(parts, 1) for path in own}
    link = Link(secret, addresses, sites, torch_device(device), **timing)
    try:
        loaded = put_together(
            name, source, link, adapters or {},
            device=device, dtype=dtype, revision=revision, quantization=quantization,
        )  # fmt: skip
    except BaseException:
        link.close()
        raise
    return SplitModel(loaded, link)


def put_together(
    name: str, source: str, route: Route, adapters: Mapping[str, str], *, revision: str | None, **options: Any
) -> Loaded:
    """The same over a route whose stations are `LoadedShard`s. `options` as of `load_part`."""
    model, dispatcher = load_home(source, route, revision=revision, **options)
    ask = _Asked(route, name, adapters)
    loaded = measure_split(model, dispatcher, name, tokenizer_of(Source.of(source, revision)), ask)
    if adapters:
        loaded = ask.adapted(loaded, dispatcher)
    ask.serve(loaded)
    return loaded


class _Asked:
    """Asks every shard, all at the same time."""

    def __init__(self, route: Route, name: str, adapters: Mapping[str, str]) -> None:
        self._route = route
        self._name = name
        self._adapters = dict(adapters)
        self._sites = sorted(set(route.sites.values()))
        self._feeding: Nest = None

    def __call__(self, feeding: Feeding, outputs: Mapping[str, Nest]) -> list[Report]:
        self._feeding = feeding_nest(feeding)
        request = {
            "feeding": self._feeding,
            "outputs": dict(outputs),
            "name": self._name,
            "adapters": bool(self._adapters),
        }
        return [Report.of_nest(nest) for nest in self._all(MEASURE, request)]

    def adapted(self, loaded: Loaded, dispatcher: Dispatcher) -> Loaded:
        """The model with its adapters, which every site loads for itself."""
        # One commit for all parts, whatever is pushed to the hub meanwhile.
        sources = {name: pinned(name, source) for name, source in self._adapters.items()}
        own = {name: at_home(loaded, dispatcher, name, source) for name, source in sources.items()}
        request = {"model": self._told(loaded), "outputs": dict(dispatcher.outputs), "adapters": sources}
        told = self._all(ADAPT, request)
        for name, adapter in own.items():
            loaded = offering(loaded, name, adapter, [Fitted.of_nest(nest[name]) for nest in told])
        return loaded

    def serve(self, loaded: Loaded) -> None:
        """Have the shards run their parts of graphs from now on, and home do what they ask for."""
        answer(loaded)
        self._all(SERVE, {"model": self._told(loaded), "sites": dict(self._route.sites)})

    def _told(self, loaded: Loaded) -> Nest:
        """What shards must know of the whole model."""
        return {
            "feeding": self._feeding,
            "manifest": encode_manifest(loaded.manifest),
            "rewritten": [[*place] for place in loaded.rewritten],
            "first_only": [*loaded.first_only],
        }

    def _all(self, name: str, request: Nest) -> list[Any]:
        with ThreadPoolExecutor(len(self._sites)) as pool:
            return list(pool.map(lambda site: self._route.errand(site, name, request), self._sites))
