"""What a manifest says beyond measured modules: figures, versions, the tokenizer, and a revision of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from .independence import rope_settings
from .inputs import Feeding, text_config
from .offloaded import brought

_FIGURES = {
    "type": "model_type",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "hidden": "hidden_size",
}
_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
_SAMPLED = 1024
_SUMMED_BYTES = 4 << 30
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def versions() -> dict[str, str]:
    """Libraries whose version can change a result."""
    return {name: version(name) for name in ("interpose", "torch", "transformers")}


def figures(model: nn.Module) -> dict[str, Any]:
    """A config's figures for people."""
    config = getattr(model, "config", None)
    text = text_config(model)
    found = {name: getattr(config, at, getattr(text, at, None)) for name, at in _FIGURES.items()}
    known = {name: value for name, value in found.items() if isinstance(value, (int, str))}
    return {**known, "parameters": sum(param.numel() for param in model.parameters())}


def windows(model: nn.Module, blocks: Sequence[str]) -> dict[str, int]:
    """Block -> how far back its cache reaches, for those whose cache lets go of older positions."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return {}
    layers = DynamicCache(config=config).layers
    if len(layers) != len(blocks):
        return {}
    found = {block: getattr(layer, "sliding_window", None) for block, layer in zip(blocks, layers, strict=True)}
    return {block: size for block, size in found.items() if isinstance(size, int)}


def longest_row(model: nn.Module, feeding: Feeding) -> int | None:
    """Most positions a row may have, None for no bound the config knows of."""
    config = getattr(model, "config", None)
    longest = getattr(text_config(model), "max_position_embeddings", None) if feeding.ids else None
    if not isinstance(longest, int) or longest <= 0:
        return None
    # Dynamic scaling is there to go beyond the trained length, by a factor.
    factors = [s.get("factor") or 1 for s in rope_settings(config) if s["rope_type"] == "dynamic"]
    return int(longest * max(factors, default=1)) - (feeding.offset or 0)


def tokenizer(tokens: Any) -> tuple[bytes | None, dict[str, Any]]:
    """The tokenizer's file as it really works, and what turns text to ids beyond it.

    Taken from the live object, as the library adds to what a folder's file says.
    """
    backend = getattr(tokens, "backend_tokenizer", None)
    if backend is None:
        return None, {}
    plain = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    config: dict[str, Any] = {}
    for name in _SPECIAL:
        token = getattr(tokens, f"{name}_token", None)
        if token is not None:
            config[f"{name}_token"] = str(token)
            config[f"{name}_token_id"] = getattr(tokens, f"{name}_token_id")
    # What the tokenizer does counts; flags of that name are often wrong, as the file's own rules do the adding.
    ids = tokens("a").input_ids
    if not ids:
        return None, {}  # the library makes an empty one for a folder without
    for name, place in (("bos", 0), ("eos", -1)):
        config[f"add_{name}_token"] = ids[place] == config.get(f"{name}_token_id")
    if getattr(tokens, "chat_template", None) is not None:
        config["chat_template"] = tokens.chat_template
    if isinstance(tokens.model_max_length, int) and tokens.model_max_length < 1 << 40:
        config["model_max_length"] = tokens.model_max_length
    return json.dumps(plain, ensure_ascii=False).encode(), config


def revision(model: nn.Module) -> str:
    """Hash of what decides results: class, config, weights, library versions.

    Of each weight its name, shape, dtype and up to 1024 evenly spaced elements count; for models up to 4 GiB also
    the sum of all elements' bits, so that one edited row shows.
    """
    return revision_of(about(model), weight_marks(model))


def revision_of(about: str, marks: Mapping[str, tuple[str, bytes]]) -> str:
    """The same from what `about` and `weight_marks` say, in their order: of a model whose weights lie apart."""
    digest = hashlib.sha256()
    digest.update(about.encode())
    for name, (form, content) in marks.items():
        digest.update(f"{name} {form}".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


def about(model: nn.Module) -> str:
    """What beside weights decides results: class, config, versions; as JSON."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    return json.dumps([type(model).__name__, settings, versions()], sort_keys=True, default=str)


def weight_marks(model: nn.Module) -> dict[str, tuple[str, bytes]]:
    """Name of a weight -> its form, and what stands for its content; nothing for one that isn't here."""
    weights = dict(_weights(model))
    whole = sum(value.nbytes for value in weights.values()) <= _SUMMED_BYTES
    return {
        name: (f"{tuple(value.shape)} {value.dtype}", _content(_brought(model, name, value), whole=whole))
        for name, value in weights.items()
    }


def _brought(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A weight with its numbers, where only its module knows how to get them."""
    path, _, own = name.rpartition(".")
    return brought(model.get_submodule(path), own, value) if value.is_meta else value


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    state: Mapping[str, Any] = model.state_dict()
    for name, value in state.items():
        if isinstance(value, Tensor) and not value.is_quantized and value.layout == torch.strided:
            yield name, value.detach()


def _content(value: Tensor, *, whole: bool) -> bytes:
    word = _WORDS.get(value.element_size())
    if value.is_meta or value.numel() == 0 or word is None:
        return b""
    flat = value.reshape(-1).view(word)
    sampled = flat[:: max(1, len(flat) // _SAMPLED)].cpu().numpy().tobytes()
    total = int(flat.sum(dtype=torch.int64)) if whole else 0
    return sampled + str(total).encode()
