"""A model ready to run, from the hub, a folder, or a live module, with the manifest measured on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from ..errors import ConfigError, ModelUnavailable
from ..graph.manifest import Manifest
from . import attention, describe, independence, named
from .feeding import examples, measure_feeding, places
from .inputs import Feeding, vocabulary
from .pieces import joined
from .probe import probe

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

_KINDS = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModelForQuestionAnswering,
    transformers.AutoModelForImageTextToText,
    transformers.AutoModelForImageClassification,
    transformers.AutoModel,
)


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


def load(
    source: str | Path,
    *,
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Loaded:
    """A hub id or a folder, loaded. Code that comes with a model is never run.

    Args:
        name: what it is served as; default: the hub id, or the folder's base name.
        device: "cpu", "cuda", "cuda:1", ...; "auto" spreads it over all there are; default: a GPU if there is one.
        dtype: "float32", "bfloat16", ...; default and "auto": as saved.
        revision: the hub's.
        local_files_only: use what is cached, ask no network.

    Raises:
        ConfigError: no such folder, device or dtype, or a model that needs code of its own.
        ModelUnavailable: the hub doesn't give it.
    """
    folder = _folder(source)
    place = str(folder or source)
    hub: dict[str, Any] = {"local_files_only": local_files_only or folder is not None, "trust_remote_code": False}
    if folder is None:
        hub["revision"] = revision
    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if device == "auto":
        options["device_map"] = "auto"
    config = _fetch(place, lambda: AutoConfig.from_pretrained(place, **hub))
    kind = _kind(config)
    model = _fetch(place, lambda: kind.from_pretrained(place, config=config, **hub, **options))
    if device != "auto":
        model.to(_device(device))
    try:
        tokens = AutoTokenizer.from_pretrained(place, **hub)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        tokens = None  # a model without a tokenizer takes ids
    return wrap(model, name or (folder.name if folder else place), tokens)


def wrap(model: nn.Module, name: str, tokenizer: Any = None) -> Loaded:
    """A live model, as if loaded: put in eval mode, its parameters frozen, its attention made readable.

    Args:
        tokenizer: one of the transformers library, if there is one.
    """
    model.eval().requires_grad_(False)
    modules = dict(model.named_modules())
    device = next((param.device for param in model.parameters() if not param.is_meta), torch.device("cpu"))
    feeding = measure_feeding(model, device)
    batches = []
    if feeding.works:
        runs = [examples(model, feeding, lengths) for lengths in ([5], [6, 4], [3])]
        batches = [feeding.kwargs(joined(part, feeding.inputs, device)) for part in (runs[:1], runs[1:])]
        if feeding.image_token is not None:
            batches.append(
                feeding.kwargs(
                    joined([examples(model, feeding, [4 + places(model, feeding)], [1])], feeding.inputs, device)
                )
            )
    readable = attention.install(model, batches)
    measured = probe(model, modules, feeding, device, readable)
    longest = describe.longest_row(model, feeding)
    verdict = independence.Verdict(False, f"not checked: {measured.note}")
    if not measured.note:
        layout = measured.modules[""].points.get("output")
        verdict = independence.check(model, feeding, device, longest, layout)
    file, file_config = describe.tokenizer(tokenizer)
    manifest = Manifest(
        model=name,
        revision=describe.revision(model),
        architecture=type(model).__name__,
        dtype=describe.weights_dtype(model),
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
    return named.settle(
        Loaded(model, manifest, file, names, modules, device, feeding, measured.rewritten, measured.first_only)
    )


def _folder(source: str | Path) -> Path | None:
    """The folder a source names, None for a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} holds no config.json: give the folder that save_pretrained wrote")
        return path.resolve()
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        raise ConfigError(f"there is no folder {text!r}; give one, or a hub id such as 'org/name'")
    return None


def _fetch(place: str, get: Any) -> Any:
    try:
        return get()
    except OSError as error:
        raise ModelUnavailable(
            f"{place} can't be loaded: {_first_line(error)}. Check the name, the network, and for a gated model "
            "that you are logged in; a folder works too"
        ) from error
    except (ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{place} can't be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _kind(config: PretrainedConfig) -> Any:
    """The library's Auto class that makes the architecture a config names."""
    wanted = set(config.architectures or ())
    offers = {kind: kind._model_mapping.get(type(config), None) for kind in _KINDS}
    for kind, found in offers.items():
        classes = found if isinstance(found, tuple) else (found,)
        if any(cls is not None and cls.__name__ in wanted for cls in classes):
            return kind
    # Folders of old may name none; what writes text is what people mean.
    for kind, found in offers.items():
        if found is not None:
            return kind
    raise ConfigError(f"no model class for a config of type {config.model_type!r}")


def _dtype(name: str | None) -> Any:
    if name in (None, "auto"):
        return "auto"
    if name not in _DTYPES:
        raise ConfigError(f"no dtype {name!r}; there are auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} can't be used: {_first_line(error)}") from error
    return device
