"""A model ready to run, from the hub, a folder, or a live module, with the manifest measured on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from ..errors import ConfigError
from ..graph.manifest import Manifest
from . import attention, describe, independence, lora, named
from .adapters import Adapter
from .feeding import examples, measure_feeding, places
from .inputs import Feeding, device_of, vocabulary
from .layouts import weights_dtype
from .pieces import joined
from .probe import Measured, probe
from .quantized import scheme
from .sources import Source, auto_class, torch_device, torch_dtype
from .split.sites import Split


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in eval mode whose parameters ask for no gradients, and what was measured on it.

    Attributes:
        tokenizer_bytes: a `tokenizer.json`, None without a tokenizer the library can write as one.
        names, modules: module -> path and back; a module held twice goes by its first path.
        device: where its inputs go.
        feeding: how it wants its inputs.
        rewritten: (path, event) where it later writes over what it handed out.
        first_only: modules whose forward calls other functions in a generation's later steps.
        adapters: what a run may choose, by name.
        split: where its blocks are, if they lie on shards; then `modules` holds stubs in their place.
    """

    model: nn.Module
    manifest: Manifest
    tokenizer_bytes: bytes | None
    names: dict[nn.Module, str]
    modules: dict[str, nn.Module]
    device: torch.device
    feeding: Feeding
    rewritten: frozenset[tuple[str, str]] = frozenset()
    first_only: frozenset[str] = frozenset()
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    split: Split | None = None

    @property
    def own(self) -> Mapping[str, nn.Module]:
        """The modules but for stubs of those that are elsewhere."""
        far = {} if self.split is None else self.split.sites.blocks
        return {path: module for path, module in self.modules.items() if path not in far}


def load(
    source: str | Path,
    *,
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    quantization: str | None = None,
    local_files_only: bool = False,
    adapters: Mapping[str, str | Path] | None = None,
) -> Loaded:
    """A hub id or a folder, loaded. Code that comes with a model is never run.

    Args:
        name: what it is served as; default: the hub id, or the folder's base name.
        device: "cpu", "cuda", "cuda:1", ...; "auto" spreads it over all there are; default: a GPU if there is one.
        dtype: "float32", "bfloat16", ...; default and "auto": as saved.
        revision: the hub's.
        quantization: a key of `quantized.SCHEMES`; default: as saved.
        local_files_only: use what is cached, ask no network.
        adapters: name -> folder or hub id of LoRA weights that runs may choose.

    Raises:
        ConfigError: no such folder, device, dtype or quantization, none that works here, or a model that needs code
            of its own.
        ModelUnavailable: the hub doesn't give it.
    """
    at = Source.of(source, revision, local_files_only=local_files_only)
    options: dict[str, Any] = {"dtype": torch_dtype(dtype), **scheme(quantization)}
    config = at.config()
    placed = None if device == "auto" else torch_device(device)
    quantised = quantization is not None or getattr(config, "quantization_config", None) is not None
    if placed is None or quantised:
        # What is quantised can't be moved afterwards.
        options["device_map"] = "auto" if placed is None else {"": placed}
    kind = auto_class(config)
    model = at.fetch(lambda: kind.from_pretrained(at.place, config=config, **at.hub, **options))
    if placed is not None and not quantised:
        model.to(placed)
    found = wrap(model, name or (at.folder.name if at.folder else at.place), tokenizer_of(at))
    return with_adapters(found, adapters or {}, local_files_only=local_files_only)


def tokenizer_of(at: Source) -> Any:
    """The library's tokenizer of a model, None for one without: that takes ids."""
    try:
        return AutoTokenizer.from_pretrained(at.place, **at.hub)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def with_adapters(loaded: Loaded, sources: Mapping[str, str | Path], *, local_files_only: bool = False) -> Loaded:
    """The same model with more adapters that runs may choose; one of a name that is there already takes its place.

    Raises ConfigError, ModelUnavailable.
    """
    if sources and loaded.split is not None:
        raise ConfigError(f"{loaded.manifest.model} lies in several processes: its adapters are loaded when it is")
    for name, source in sources.items():
        adapter = lora.load(loaded.model, name, source, local_files_only=local_files_only)
        loaded = offering_adapter(loaded, name, adapter)
        info = replace(adapter.info, refused=named.refused_with(loaded, name).points)
        loaded = offering_adapter(loaded, name, replace(adapter, info=info))
    return loaded


def offering_adapter(loaded: Loaded, name: str, adapter: Adapter) -> Loaded:
    """The same model with an adapter in its manifest, too."""
    adapters = {**loaded.adapters, name: adapter}
    infos = {known: adapters[known].info for known in sorted(adapters)}
    return replace(loaded, adapters=adapters, manifest=replace(loaded.manifest, adapters=infos))


def wrap(model: nn.Module, name: str, tokenizer: Any = None) -> Loaded:
    """A live model, as if loaded: put in eval mode, its parameters frozen, its attention made readable.

    Args:
        tokenizer: one of the transformers library, if there is one.
    """
    model.eval().requires_grad_(False)
    modules = dict(model.named_modules())
    device = device_of(model)
    feeding = measure_feeding(model, device)
    readable = attention.install(model, trials(model, feeding, device))
    measured = probe(model, modules, feeding, device, readable)
    return named.settle(described(model, name, tokenizer, feeding, measured))


def trials(model: nn.Module, feeding: Feeding, device: torch.device) -> list[dict[str, Any]]:
    """Arguments of a few small forwards: unpadded, padded, with an image where it takes any."""
    if not feeding.works:
        return []
    runs = [examples(model, feeding, lengths) for lengths in ([5], [6, 4], [3])]
    batches = [runs[:1], runs[1:]]
    if feeding.image_token is not None:
        batches.append([examples(model, feeding, [4 + places(model, feeding)], [1])])
    return [feeding.kwargs(joined(batch, feeding.inputs, device)) for batch in batches]


def described(
    model: nn.Module,
    name: str,
    tokenizer: Any,
    feeding: Feeding,
    measured: Measured,
    *,
    verdict: independence.Verdict | None = None,
    revision: str | None = None,
    parameters: int | None = None,
) -> Loaded:
    """A model with all that is said of it but its named points.

    Args:
        verdict, revision: made here if they aren't given.
        parameters: how many it has, where some lie elsewhere.
    """
    modules = dict(model.named_modules())
    device = device_of(model)
    longest = describe.longest_row(model, feeding)
    if measured.note:
        verdict = independence.Verdict(False, f"not checked: {measured.note}")
    elif verdict is None:
        layout = measured.modules[""].points.get("output")
        verdict = independence.check(model, feeding, device, longest, layout, parameters)
    file, file_config = describe.tokenizer(tokenizer)
    manifest = Manifest(
        model=name,
        revision=describe.revision(model) if revision is None else revision,
        architecture=type(model).__name__,
        dtype=weights_dtype(model),
        modules=measured.modules,
        blocks=measured.blocks,
        towers=measured.towers,
        vocab=vocabulary(model) if feeding.ids else None,
        positions=longest,
        attention=measured.attention,
        row_independent=verdict.independent,
        row_note=verdict.note,
        even_rows=verdict.even_rows,
        tokens=feeding.ids,
        inputs=feeding.inputs,
        image_token=feeding.image_token,
        image_tokens=feeding.image_tokens,
        image_patches=feeding.image_patches,
        tokenizer=hashlib.sha256(file).hexdigest() if file else None,
        tokenizer_config=file_config,
        config=describe.figures(model),
        versions=describe.versions(),
        windows=describe.windows(model, measured.blocks),
    )
    names = {module: path for path, module in modules.items()}
    return Loaded(model, manifest, file, names, modules, device, feeding, measured.rewritten, measured.first_only)
