"""LoRA adapters as the `peft` library saves them: read, checked, and made into layers beside a model's modules."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ConfigError, first_line
from ..graph.adapters import AdapterInfo, check_name
from .adapter_files import CONFIG, WEIGHTS, config_of, folder_of, too_much
from .adapters import NAME, Adapter, attach, undisturbed
from .partial_loading import Keep

_MARK = "lora_"
"""What every weight of such a layer has in its name."""


def _every(name: str) -> bool:
    return True


def load(
    model: nn.Module,
    name: str,
    source: str | Path,
    *,
    keep: Keep = _every,
    local_files_only: bool = False,
) -> Adapter:
    """An adapter from a folder that `save_pretrained` wrote, or from the hub, for a model in eval mode.

    Args:
        model: all of its tree. Of modules that aren't kept the weights may be on meta; they get no layers, and of
            the adapter's file what concerns them isn't read.
        keep: asked for the parameters of modules, by full names.

    Raises:
        ConfigError: no such folder, not a LoRA adapter that can stand beside a model, or not one of this model.
        ModelUnavailable: the hub doesn't give it.
    """
    check_name(name)
    peft = library()
    folder = folder_of(name, source, local_files_only=local_files_only)
    config = config_of(name, folder)
    with _fitting(name):
        weights = _weights(name, folder, model, keep)
        with undisturbed(model) as layers:
            wrapped: Any = peft.PeftModel(model, config, NAME)
            told: Any = peft.set_peft_model_state_dict(wrapped, weights, adapter_name=NAME)
    paths = _checked(model, name, config, layers)
    missing = [key for key in told.missing_keys if _MARK in key]
    if missing or told.unexpected_keys:
        first = [*told.unexpected_keys, *missing][0]
        raise ConfigError(f"adapter {name!r} isn't of this model, or lacks weights: {first}")
    kept = {module: layer for module, layer in layers.items() if keep(f"{paths[module]}.weight")}
    for module, layer in kept.items():
        if any(weight.is_meta for weight in (*module.parameters(), *layer.parameters())):
            raise ConfigError(f"adapter {name!r}: the weights of {paths[module]} aren't in this process's memory")
        layer.eval().requires_grad_(False)
    attach(kept)
    ends = {paths[module].rpartition(".")[2] for module in layers}
    rank = max((layer.r[NAME] for layer in layers.values()), default=0)
    return Adapter(AdapterInfo(rank, tuple(sorted(ends)), len(layers), _revision(folder)), kept)


@contextmanager
def in_place(model: nn.Module, name: str, folder: Path) -> Iterator[dict[nn.Module, Any]]:
    """A model on meta that runs with an adapter's layers inside, as its config tells of them.

    Gives them by the modules in whose place they are; afterwards.

    Raises ConfigError as `load`.
    """
    peft = library()
    config = config_of(name, folder)
    config.init_lora_weights = False  # how it begins is nothing to its size
    with undisturbed(model) as layers:
        with _fitting(name), torch.device("meta"):
            peft.PeftModel(model, config, NAME)
        yield layers
    _checked(model, name, config, layers)


def nbytes(model: nn.Module, name: str, folder: Path) -> dict[str, int]:
    """What each layer of an adapter takes beside a model on meta, by its module's path. Raises as `in_place`."""
    with in_place(model, name, folder) as layers:
        pass
    paths = {module: path for path, module in model.named_modules()}
    return {paths[module]: _own_bytes(layer) for module, layer in layers.items()}


def _own_bytes(layer: nn.Module) -> int:
    """Without those of the module in whose place it runs."""
    return sum(held.nbytes for key, held in layer.named_parameters() if not key.startswith("base_layer."))


def library() -> Any:
    """Raises ConfigError."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConfigError(
            'adapters need the library peft; install it with: pip install "interpose[local]"'
        ) from error
    return peft


@contextmanager
def _fitting(name: str) -> Iterator[None]:
    """What the library says of an adapter that isn't of the model, as ConfigError."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError, TypeError, ArithmeticError, re.error) as error:
        raise ConfigError(f"adapter {name!r} doesn't fit the model: {first_line(error)}") from error


def _checked(model: nn.Module, name: str, config: Any, layers: Mapping[nn.Module, Any]) -> dict[nn.Module, str]:
    """The paths of the model's modules. Raises ConfigError: its layers aren't LoRA's, each of one module."""
    if parameters := config.target_parameters:  # into which the library may have turned modules that it has fused
        raise too_much(name, "target_parameters", sorted(parameters))
    paths = {module: path for path, module in model.named_modules()}
    for module, layer in layers.items():
        if not hasattr(layer, "lora_A") or not hasattr(layer, "scaling"):
            raise ConfigError(
                f"adapter {name!r} puts {type(layer).__name__} at {paths[module]}, which isn't LoRA's"
            )
    return paths


def _weights(name: str, folder: Path, model: nn.Module, keep: Keep) -> dict[str, Tensor]:
    """The weights of its layers, views of the file that are read when they are touched.

    What is saved with them of the model itself must be the model's; of what isn't kept, whoever has it looks.
    """
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ConfigError(f"adapter {name!r}: {WEIGHTS} can't be read: {first_line(error)}") from error
    own = dict(model.named_parameters())
    for key in [key for key in weights if _MARK not in key]:
        value = weights.pop(key)
        path = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        there = own.get(path)
        if (
            there is None
            or there.shape != value.shape
            or (keep(path) and not torch.equal(there.to(value.device, value.dtype), value))
        ):
            raise ConfigError(f"adapter {name!r} brings weights in the place of the model's own: {key}")
    return weights


def _revision(folder: Path) -> str:
    """Hash of an adapter's settings and weights."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]
