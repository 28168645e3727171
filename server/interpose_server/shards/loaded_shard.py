"""One shard's part of a model: it measures its slice once, lets go of what isn't its own, and serves its blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from interpose.graph.manifest import decode_manifest
from interpose.runtime.adapters import Adapter
from interpose.runtime.loading import Loaded
from interpose.runtime.split.adapting import on_slice
from interpose.runtime.split.building import load_slice, release
from interpose.runtime.split.guest import Exit, Graphs
from interpose.runtime.split.route import Mail, Nest, Visit
from interpose.runtime.split.shard import Shard
from interpose.runtime.split.sites import Sites
from interpose.runtime.split.slices import feeding_of, measured
from torch import Tensor, nn

from ..worker.memory import free_bytes

MEASURE, ADAPT, SERVE, FREE = "part.measure", "part.adapt", "part.serve", "part.free"
"""Errands: measure the slice (once), load adapters on it (once), run parts of graphs from now on, tell how many
bytes of memory are left."""


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
        self._adapters: Mapping[str, Adapter] = {}

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
        if name == ADAPT:
            return self._adapted(request)
        if name == SERVE:
            return self._serve(request)
        if name == FREE:
            return free_bytes(self._model)
        return self._shard.errand(name, request)

    def _measured(self, request: Nest) -> Nest:
        outputs = self._outputs(request)
        report = measured(self._model, self._own, outputs, feeding_of(request["feeding"]), request["name"])
        if not request["adapters"]:
            self._release()
        return report.to_nest()

    def _adapted(self, request: Nest) -> Nest:
        loaded = self._loaded(request["model"])
        self._adapters, found = on_slice(loaded, self._own, self._outputs(request), request["adapters"])
        self._release()
        return {name: fitted.to_nest() for name, fitted in found.items()}

    def _outputs(self, request: Nest) -> Mapping[str, Nest]:
        """What blocks return, in their order."""
        return {path: request["outputs"][path] for path in self._blocks}

    def _release(self) -> None:
        """Let go of what only the slice needed."""
        release(self._model, self._own)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _serve(self, request: Nest) -> None:
        loaded = self._loaded(request["model"])
        self._shard.adapters = self._adapters
        self._shard.guest = Graphs(loaded, Sites(request["sites"], loaded.manifest), self._site, self._exit)

    def _loaded(self, request: Nest) -> Loaded:
        """The part with what home says of the whole model."""
        modules = dict(self._model.named_modules())
        return Loaded(
            model=self._model,
            manifest=decode_manifest(request["manifest"]),
            tokenizer_bytes=None,
            names={module: path for path, module in modules.items()},
            modules=modules,
            device=self.device,
            feeding=feeding_of(request["feeding"]),
            rewritten=frozenset((path, event) for path, event in request["rewritten"]),
            first_only=frozenset(request["first_only"]),
            adapters=self._adapters,
        )


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
