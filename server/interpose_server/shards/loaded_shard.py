"""One shard's part of a model: it measures its slice once, lets go of what isn't its own, and serves its blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from interpose.graph.manifest import decode_manifest
from interpose.runtime.loading import Loaded
from interpose.runtime.split.building import load_slice, release
from interpose.runtime.split.guest import Exit, Graphs
from interpose.runtime.split.route import Mail, Nest, Visit
from interpose.runtime.split.shard import Shard
from interpose.runtime.split.sites import Sites
from interpose.runtime.split.slices import feeding_of, measured
from torch import Tensor, nn

from ..worker.memory import free_bytes

MEASURE, SERVE, FREE = "part.measure", "part.serve", "part.free"
"""Errands: measure the slice (once), run parts of graphs from now on, tell how many bytes of memory are left."""


class LoadedShard:
    """A `Station`: a shard, and what is asked of it while the model is put together.

    Args:
        model: as `load_slice` gives it.
        own, blocks: paths of its blocks, and of all.
        exit_: by which saved values leave from here; by default they all go home.
    """

    def __init__(
        self, site: int, model: nn.Module, own: Sequence[str], blocks: Sequence[str], exit_: Exit | None = None
    ) -> None:
        self._exit = exit_
        self._site = site
        self._model = model
        self._own = own
        self._blocks = blocks
        self.device = next(param.device for param in model.get_submodule(own[0]).parameters())
        self._shard = Shard(site, {path: model.get_submodule(path) for path in own}, self.device)

    def visit(
        self, number: int, hidden: Tensor, visit: Visit, mail: Sequence[Mail]
    ) -> tuple[Tensor | None, Nest, Sequence[Mail]]:
        return self._shard.visit(number, hidden, visit, mail)

    def wave(
        self, number: int, gradients: Sequence[Tensor | None], work: Nest, mail: Sequence[Mail]
    ) -> tuple[Sequence[Tensor | None], Nest, Sequence[Mail]]:
        return self._shard.wave(number, gradients, work, mail)

    def drop(self, numbers: Collection[int], caches: Collection[int]) -> None:
        self._shard.drop(numbers, caches)

    def errand(self, name: str, request: Nest) -> Nest:
        if name == MEASURE:
            return self._measured(request)
        if name == SERVE:
            return self._serve(request)
        if name == FREE:
            return free_bytes(self._model)
        return self._shard.errand(name, request)

    def _measured(self, request: Nest) -> Nest:
        outputs = {path: request["outputs"][path] for path in self._blocks}
        report = measured(self._model, self._own, outputs, feeding_of(request["feeding"]), request["name"])
        release(self._model, self._own)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return report.to_nest()

    def _serve(self, request: Nest) -> None:
        modules = dict(self._model.named_modules())
        manifest = decode_manifest(request["manifest"])
        loaded = Loaded(
            model=self._model,
            manifest=manifest,
            tokenizer_bytes=None,
            names={module: path for path, module in modules.items()},
            modules=modules,
            device=self.device,
            feeding=feeding_of(request["feeding"]),
            rewritten=frozenset((path, event) for path, event in request["rewritten"]),
            first_only=frozenset(request["first_only"]),
        )
        self._shard.guest = Graphs(loaded, Sites(request["sites"], manifest), self._site, self._exit)


def load_shard(
    site: int,
    source: str,
    own: Sequence[str],
    blocks: Sequence[str],
    exit_: Exit | None = None,
    **options: Any,
) -> LoadedShard:
    """Read one shard's part of a model. `options` as of `load_part`. Raises as that does."""
    return LoadedShard(site, load_slice(source, set(own), blocks, **options), own, blocks, exit_)
