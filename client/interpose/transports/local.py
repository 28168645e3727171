"""Running a graph in this process, on a model loaded here. Torch is imported when the first model is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..graph.manifest import Manifest
from ..graph.model import Graph
from ..wire.stream import NewTokens

if TYPE_CHECKING:
    import torch

    from ..runtime.given import Given
    from ..runtime.loading import Loaded
    from ..runtime.wrapped import Inputs, Measurement


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
    def wrap(
        cls, module: Any, name: str, tokenizer: Any = None, adapters: Mapping[str, str | Path] | None = None
    ) -> LocalModel:
        """A module that is loaded already. `adapters`: name -> source."""
        from ..runtime.loading import with_adapters, wrap

        return cls(with_adapters(wrap(module, name, tokenizer), adapters or {}))

    def with_adapter(self, name: str, source: str | Path) -> LocalModel:
        """The same model with one more adapter. Waits for the run under way."""
        from ..runtime.loading import with_adapters

        with self._turn:
            made = LocalModel(with_adapters(self.loaded, {name: source}))
        made._turn = self._turn  # who runs the one still waits for who runs the other
        return made

    @property
    def manifest(self) -> Manifest:
        return self.loaded.manifest

    def run(
        self,
        graph: Graph,
        tensors: Mapping[str, Any],
        *,
        exclusive: bool = False,
        on_tokens: Callable[[NewTokens], None] | None = None,
    ) -> dict[int, torch.Tensor]:
        """The saved values by node. Raises the job's error, or that of `on_tokens`. Threads take turns."""
        import torch

        from ..runtime.engine import EngineJob

        attachments = {key: torch.as_tensor(value) for key, value in tensors.items()}
        taken = {*self._own, *(tensor.untyped_storage().data_ptr() for tensor in attachments.values())}
        sink = _Kept(taken, on_tokens)
        with self._turn:
            (error,) = self.engine.run([EngineJob(graph, attachments, sink, exclusive=exclusive)])
        if sink.broken is not None:
            raise sink.broken
        if error is not None:
            raise error
        return sink.values


class LocalModule:
    """Any torch module in this process. Raises BadArgument if it isn't one that can be looked into."""

    def __init__(self, module: Any, name: str, rows: int = 0) -> None:
        from ..runtime.wrapped import Wrapped

        self.wrapped = Wrapped(module, name, rows)
        self.last: Measurement | None = None
        """On the inputs that came last."""
        self._turn = threading.Lock()

    def tree(self) -> Measurement:
        """Its modules and parameters, nothing measured."""
        return self.wrapped.tree()

    def measure(self, given: Given, *, shared: bool) -> Measurement:
        """What is known of it on such inputs; it runs on those of a kind that is new. Threads take turns."""
        with self._turn:
            self.last = self.wrapped.measure(given, shared=shared)
            return self.last

    def count(self, given: Given) -> int:
        """The rows of some inputs. Raises BadArgument if they don't agree."""
        from ..runtime.given import count

        return count(given, self.wrapped.rows)

    def run(
        self, graph: Graph, tensors: Mapping[str, Any], inputs: Inputs, measured: Sequence[Measurement]
    ) -> dict[int, Any]:
        """The saved values by node. Raises what ended the run. Threads take turns."""
        import torch

        attachments = {key: torch.as_tensor(value) for key, value in tensors.items()}
        # A module of any kind may go on to write over what it has shown.
        sink = _Kept(None)
        with self._turn:
            self.wrapped.run(graph, inputs, measured, attachments, sink)
        return sink.values


class _Kept:
    """Keeps saved values. One that shares memory with the model, the user or another saved one is copied.

    `taken`: where memory begins that isn't ours; None if any may be another's.
    """

    def __init__(self, taken: set[int] | None, on_tokens: Callable[[NewTokens], None] | None = None) -> None:
        from ..runtime.nests import transform

        self.values: dict[int, Any] = {}
        self._transform = transform
        self.broken: BaseException | None = None
        """What the user's own function raised; it ends the run."""
        self._taken = None if taken is None else set(taken)
        self._on_tokens = on_tokens

    def save(self, node: int, value: Any) -> None:
        self.values[node] = self._transform(value, self._own)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._taken is None:
            return tensor.clone()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._taken or storage.nbytes() != tensor.nbytes:
            return tensor.clone()
        self._taken.add(storage.data_ptr())
        return tensor

    def log(self, node: int, text: str) -> None:
        print(text)

    def tokens(self, run: int, step: int, ids: Sequence[int | None]) -> None:
        if self._on_tokens is None or self.broken is not None:
            return
        try:
            self._on_tokens(NewTokens(0, run, step, tuple(ids)))
        except BaseException as error:  # noqa: BLE001 - raised again when the engine has let go of the run
            self.broken = error

    def cancelled(self) -> bool:
        return False
