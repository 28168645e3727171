"""Where a model is: on a server, in this process, or both; and how a graph gets there."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import CONFIG
from .errors import ConfigError, InterposeError, ModelUnavailable, UnknownModel
from .graph.adapters import revision_of
from .graph.limits import Limits
from .graph.manifest import Manifest
from .graph.model import Graph
from .graph.validate import validate
from .tracing.bases import MakeValue
from .tracing.execution import Handle, Options
from .tracing.notes import note

if TYPE_CHECKING:
    from .transports.local import LocalModel


class ModelAccess:
    """A model by its source: its manifest and tokenizer, wherever they come from.

    Args:
        source: a name on a server, a hub id, a local folder, or a loaded module.
        load: options of `interpose.runtime.loading.load`, for when it is needed here.
        tokenizer: to use instead of the model's own.
        adapters: name -> source of LoRA weights, for when it is loaded here.
    """

    def __init__(
        self,
        source: Any,
        host: str | None = None,
        api_key: str | None = None,
        load: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        self.source = source
        self._server = (host, api_key)
        self._load = load or {}
        self._adapters = dict(adapters or {})
        self._given_tokenizer = tokenizer
        self.processor: Any = None
        """What makes a model's inputs of texts and images, once it is known."""
        self._local: LocalModel | None = None
        self._remote: Manifest | None = None
        self._tokenizers: dict[str | None, Any] = {}

    @property
    def name(self) -> str:
        return self.source if isinstance(self.source, str) else type(self.source).__name__

    @property
    def prefers_server(self) -> bool:
        """Whether to describe the model as the server does: it isn't loaded here, and the host has it."""
        if self._local is not None or not isinstance(self.source, str):
            return False
        if self._remote is not None:
            return True
        if not (self._server[0] or CONFIG.HOST):
            return False
        try:
            self.manifest(remote=True)
        except UnknownModel:
            note(f"the server doesn't have {self.name}; using the local model's own description")
            return False
        return True

    def manifest(self, remote: bool) -> Manifest:
        if not remote:
            return self.local.manifest
        from .client import fetch_manifest

        self._remote = fetch_manifest(self.name, *self._server)
        return self._remote

    def tokenizer(self, remote: bool) -> Any:
        """Raises ConfigError for a model without one."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        manifest = self.manifest(remote)
        # By what it says, not where: a server may come back with another model under the same name.
        if manifest.tokenizer not in self._tokenizers:
            from .tokens import Tokenizer

            data = self._tokenizer_bytes(remote)
            if data is None:
                raise ConfigError(f"{self.name} has no tokenizer; give token ids instead of text")
            self._tokenizers[manifest.tokenizer] = Tokenizer(data, manifest.tokenizer_config)
        return self._tokenizers[manifest.tokenizer]

    def _maybe_tokenizer(self, remote: bool) -> Any:
        try:
            return self.tokenizer(remote)
        except ConfigError:
            return None

    def _tokenizer_bytes(self, remote: bool) -> bytes | None:
        if not remote:
            return self.local.loaded.tokenizer_bytes
        from .client import fetch_tokenizer

        return fetch_tokenizer(self.name, *self._server)

    @property
    def local(self) -> LocalModel:
        """The model in this process, loaded when it is first asked for."""
        if self._local is None:
            if importlib.util.find_spec("torch") is None:
                raise ConfigError(
                    'a model in this process needs torch: pip install "interpose[local]"; for one on a server, set '
                    "INTERPOSE_HOST or CONFIG.HOST, and trace with remote=True"
                )
            from .transports.local import LocalModel

            if isinstance(self.source, (str, Path)):
                try:
                    self._local = LocalModel.load(self.source, adapters=self._adapters, **self._load)
                except ModelUnavailable as error:
                    raise ModelUnavailable(f"{error.message}; {self._on_a_server()}") from None
            else:
                self._local = LocalModel.wrap(self.source, self.name, self._given_tokenizer, self._adapters)
        return self._local

    def _on_a_server(self) -> str:
        """What to write if a model that isn't to be had here is meant to be a server's."""
        host = self._server[0] or CONFIG.HOST
        if not host:
            return "for a model on a server set INTERPOSE_HOST or CONFIG.HOST, and write remote=True"
        try:
            self.manifest(remote=True)
        except InterposeError:
            return "a model on a server needs remote=True"
        return f"{host} serves a model of this name: write remote=True"

    def load_adapter(self, name: str, source: Any) -> None:
        """Raises ConfigError, ModelUnavailable."""
        self._local = self.local.with_adapter(name, source)
        self._adapters[name] = source

    def face(self, remote: bool) -> MakeValue:
        """What makes deferred values: torch's face where torch is there and wanted."""
        if remote and (CONFIG.BACKEND == "numpy" or importlib.util.find_spec("torch") is None):
            from .tracing.array_face import make

            return make
        from .tracing.torch_face import make as make_torch

        return make_torch

    def execute(self, graph: Graph, tensors: Mapping[str, Any], options: Options) -> Mapping[int, Any] | Handle:
        """Run a graph where its options say; without `blocking` only a server can."""
        on_tokens = None
        if options.on_tokens is not None:
            from .live import Live

            on_tokens = Live(options.on_tokens, graph, self._maybe_tokenizer(options.remote)).take
        if not options.remote:
            if not options.blocking:
                raise ConfigError("blocking=False needs remote=True: a local run is over when the block is left")
            return self.local.run(graph, tensors, exclusive=options.batching == "exclusive", on_tokens=on_tokens)
        from .catalog import doubting
        from .client import run_remote, submit_remote
        from .wire.addressed import addressed

        manifest = self._remote
        assert manifest is not None
        validate(graph, manifest, Limits.stated(manifest.limits), batching=options.batching)
        host, key = self._server
        graph, tensors = addressed(graph, tensors)
        send = partial(run_remote, on_tokens=on_tokens) if options.blocking else submit_remote
        with doubting(self.name, host, key):
            return send(
                graph,
                self.name,
                tensors,
                revision=options.revision or revision_of(graph.runs, manifest),
                batching=options.batching,
                timeout=options.timeout,
                host=host,
                api_key=key,
            )
