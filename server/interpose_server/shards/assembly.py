"""A model whose blocks lie on shards: its home, put together from shards that listen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from interpose.graph.manifest import encode_manifest
from interpose.runtime.inputs import Feeding
from interpose.runtime.loading import Loaded, tokenizer_of
from interpose.runtime.sources import Source, torch_device
from interpose.runtime.split.building import load_home
from interpose.runtime.split.calling import answer
from interpose.runtime.split.measuring import measure_split
from interpose.runtime.split.route import Nest
from interpose.runtime.split.slices import Report, feeding_nest

from .link import Address, Link
from .loaded_shard import FREE, MEASURE, SERVE


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
    **timing: float,
) -> SplitModel:
    """Load home's part of a model, and have all of it measured.

    Args:
        name: what the model is served as.
        addresses: site -> where its shard listens.
        parts: of each site from 1 on, the paths of its blocks.
        timing: as of `Link`.

    Raises:
        ConfigError: it can't be split, or not so.
        ReplicaLost: a shard is gone.
        ModelUnavailable: the hub doesn't give it.
    """
    sites = {path: site for site, own in enumerate(parts, 1) for path in own}
    link = Link(secret, addresses, sites, torch_device(device), **timing)
    try:
        model, dispatcher = load_home(
            source, link, device=device, dtype=dtype, revision=revision, quantization=quantization
        )
        ask = _Asked(link, name)
        loaded = measure_split(model, dispatcher, name, tokenizer_of(Source.of(source, revision)), ask)
        ask.serve(loaded)
    except BaseException:
        link.close()
        raise
    return SplitModel(loaded, link)


class _Asked:
    """Asks every shard, all at the same time."""

    def __init__(self, link: Link, name: str) -> None:
        self._link = link
        self._name = name
        self._sites = sorted(set(link.sites.values()))
        self._feeding: Nest = None

    def __call__(self, feeding: Feeding, outputs: Mapping[str, Nest]) -> list[Report]:
        self._feeding = feeding_nest(feeding)
        request = {"feeding": self._feeding, "outputs": dict(outputs), "name": self._name}
        return [Report.of_nest(nest) for nest in self._all(MEASURE, request)]

    def serve(self, loaded: Loaded) -> None:
        """Have the shards run their parts of graphs from now on, and home do what they ask for."""
        answer(loaded)
        request = {
            "feeding": self._feeding,
            "manifest": encode_manifest(loaded.manifest),
            "rewritten": [[*place] for place in loaded.rewritten],
            "first_only": [*loaded.first_only],
            "sites": dict(self._link.sites),
        }
        self._all(SERVE, request)

    def _all(self, name: str, request: Nest) -> list[Any]:
        with ThreadPoolExecutor(len(self._sites)) as pool:
            return list(pool.map(lambda site: self._link.errand(site, name, request), self._sites))
