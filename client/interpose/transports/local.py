"""Running a graph in this process, on a model loaded here. Torch is imported when the first model is."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..graph.manifest import Manifest
from ..graph.model import Graph

if TYPE_CHECKING:
    import torch

    from ..runtime.loading import Loaded


class LocalModel:
    """A model in this process and the engine that runs graphs on it."""

    def __init__(self, loaded: Loaded) -> None:
        from ..runtime.engine import Engine

        self.loaded = loaded
        self.engine = Engine(loaded)
        own = (*loaded.model.parameters(), *loaded.model.buffers())
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._turn = threading.Lock()

    @classmethod
    def load(cls, source: str | Path, **options: Any) -> LocalModel:
        """Load a hub id or a local folder. Options as of `interpose.runtime.loading.load`."""
        from ..runtime.loading import load

        return cls(load(source, **options))

    @classmethod
    def wrap(cls, module: Any, name: str, tokenizer: Any = None) -> LocalModel:
        """A module that is loaded already."""
        from ..runtime.loading import wrap

        return cls(wrap(module, name, tokenizer))

    @property
    def manifest(self) -> Manifest:
        return self.loaded.manifest

    def run(self, graph: Graph, tensors: Mapping[str, Any], *, exclusive: bool = False) -> dict[int, torch.Tensor]:
        """The saved values by node. Raises the job's error. Threads take turns."""
        import torch

        from ..runtime.engine import EngineJob

        attachments = {key: torch.as_tensor(value) for key, value in tensors.items()}
        sink = _Kept({*self._own, *(tensor.untyped_storage().data_ptr() for tensor in attachments.values())})
        with self._turn:
            (error,) = self.engine.run([EngineJob(graph, attachments, sink, exclusive=exclusive)])
        if error is not None:
            raise error
        return sink.values


class _Kept:
    """Keeps saved values. One that shares memory with the model, the user or another saved one is copied."""

    def __init__(self, taken: set[int]) -> None:
        self.values: dict[int, Any] = {}
        self._taken = set(taken)

    def save(self, node: int, value: Any) -> None:
        from ..runtime.nests import transform

        self.values[node] = transform(value, self._own)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._taken or storage.nbytes() != tensor.nbytes:
            return tensor.clone()
        self._taken.add(storage.data_ptr())
        return tensor

    def log(self, node: int, text: str) -> None:
        print(text)

    def cancelled(self) -> bool:
        return False
