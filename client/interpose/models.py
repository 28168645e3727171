"""Models as the user holds them: `LanguageModel("org/name")`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .config import CONFIG
from .errors import ConfigError, DeferredError, UnknownModel
from .graph.manifest import Manifest
from .graph.model import Graph
from .tracing.handles import Module
from .tracing.notes import note
from .tracing.recorder import Recorder
from .tracing.tracer import ACTIVE, Execute, Handle, Options, Tracer


class LanguageModel(Module):
    """A language model, on a server or in this process.

    Building one loads nothing: a remote trace needs the server's manifest alone, a local one loads the weights when
    it first runs.

    Args:
        source: the name a server serves it under, a hub id, a local folder, or a loaded `torch.nn.Module`.
        host, api_key: the server; by default `CONFIG`'s.
        device_map, device: where a local model goes: "cpu", "cuda", "auto".
        dtype: of a local model's weights, as its files say by default; `torch_dtype` is the same.
        revision: of a hub model.
        tokenizer: for a loaded module: its tokenizer.
    """

    def __init__(
        self,
        source: Any,
        *,
        host: str | None = None,
        api_key: str | None = None,
        device_map: str | None = None,
        device: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        revision: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(self, "")
        chosen = dtype if dtype is not None else torch_dtype
        self.__dict__.update(
            _source=source,
            _server=(host, api_key),
            _load_options={
                "device": device or device_map,
                "dtype": None if chosen is None else str(chosen).removeprefix("torch."),
                "revision": revision,
            },
            _given_tokenizer=tokenizer,
            _local=None,
            _remote_manifest=None,
            _tokenizers={},
        )

    def trace(
        self,
        prompt: Any = None,
        *,
        remote: bool = False,
        blocking: bool = True,
        timeout: float | None = None,
        batching: Literal["auto", "exclusive"] = "auto",
    ) -> Tracer:
        """Open a block whose reads and writes happen inside one forward of the model.

        Args:
            prompt: a text, token ids, or a list of either; None to give prompts with `t.invoke(...)`.
            remote: run on the server.
            blocking: False to go on while it runs; the tracer's `job` then has `status`, `result()`, `cancel()`.
            timeout: seconds it may take.
            batching: "exclusive" to share the forward with nobody, for results bitwise those of a plain forward.
        """
        options = Options(remote, blocking, timeout, batching)
        manifest = self._manifest_of(remote)
        execute: Execute = self._run_remote if remote else self._run_local
        recorder = Recorder(manifest, _face(remote))
        return Tracer(self, recorder, prompt, partial(self._tokenize, remote), execute, options)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; needs neither a hub nor the transformers library."""
        return self._tokenizer_of(self._prefers_server())

    @property
    def manifest(self) -> Manifest:
        """Everything known of the model: modules, order, layouts, parameters."""
        return self._tree()

    @property
    def _model(self) -> Any:
        """The underlying torch module of a local model; of one on a server, its tree to print."""
        return self if self._prefers_server() else self._here().loaded.model

    # -- where it runs -----------------------------------------------------------------------------------------

    def _name(self) -> str:
        return self._source if isinstance(self._source, str) else type(self._source).__name__

    def _tree(self) -> Manifest:
        tracer = ACTIVE.get()
        if tracer is not None and tracer.model is self:
            return tracer.recorder.manifest
        return self._manifest_of(self._prefers_server())

    def _recording(self) -> Recorder:
        tracer = ACTIVE.get()
        if tracer is None or tracer.model is not self:
            raise DeferredError("values of the model exist only inside a block: with model.trace(prompt): ...")
        return tracer.recorder

    def _prefers_server(self) -> bool:
        """Whether to look the model up on the server: it isn't loaded here, and the configured host has it."""
        if self._local is not None or not isinstance(self._source, str):
            return False
        if self._remote_manifest is not None:
            return True
        if not (self._server[0] or CONFIG.HOST):
            return False
        try:
            self._manifest_of(remote=True)
        except UnknownModel:
            note(f"the server doesn't have {self._name()}; using the local model's own description")
            return False
        return True

    def _manifest_of(self, remote: bool) -> Manifest:
        if not remote:
            here: Manifest = self._here().manifest
            return here
        from .client import fetch_manifest

        host, key = self._server
        manifest = fetch_manifest(self._name(), host, key)
        self.__dict__["_remote_manifest"] = manifest
        return manifest

    def _tokenizer_of(self, remote: bool) -> Any:
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        if remote not in self._tokenizers:
            from .tokens import Tokenizer

            manifest = self._manifest_of(remote)
            if remote:
                from .client import fetch_tokenizer

                data = fetch_tokenizer(self._name(), *self._server)
            else:
                data = self._here().loaded.tokenizer_bytes
            if data is None:
                raise ConfigError(f"{self._name()} has no tokenizer; give token ids instead of text")
            self._tokenizers[remote] = Tokenizer(data, manifest.tokenizer_config)
        return self._tokenizers[remote]

    def _tokenize(self, remote: bool, text: str) -> list[int]:
        ids: list[int] = self._tokenizer_of(remote).encode(text)
        return ids

    def _here(self) -> Any:
        if self._local is None:
            if importlib.util.find_spec("torch") is None:
                raise ConfigError(
                    'a local run needs torch: pip install "interpose[local]", or trace with remote=True'
                )
            from .transports.local import LocalModel

            if isinstance(self._source, (str, Path)):
                made = LocalModel.load(self._source, **self._load_options)
            else:
                made = LocalModel.wrap(self._source, self._name(), self._given_tokenizer)
            self.__dict__["_local"] = made
        return self._local

    def _run_local(self, graph: Graph, tensors: Mapping[str, Any], options: Options) -> Mapping[int, Any]:
        return self._here().run(graph, tensors, exclusive=options.batching == "exclusive")  # type: ignore[no-any-return]

    def _run_remote(self, graph: Graph, tensors: Mapping[str, Any], options: Options) -> Mapping[int, Any] | Handle:
        from .client import run_remote, submit_remote
        from .wire.addressed import addressed

        host, key = self._server
        graph, tensors = addressed(graph, tensors)
        send = run_remote if options.blocking else submit_remote
        return send(
            graph,
            self._name(),
            tensors,
            revision=self._remote_manifest.revision,
            batching=options.batching,
            timeout=options.timeout,
            host=host,
            api_key=key,
        )


def _face(remote: bool) -> Any:
    """The face deferred values wear: torch's where torch is there and wanted."""
    if remote and (CONFIG.BACKEND == "numpy" or importlib.util.find_spec("torch") is None):
        from .tracing.array_face import make

        return make
    from .tracing.torch_face import make as make_torch

    return make_torch
