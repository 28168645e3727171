"""LoRA adapters as the `peft` library saves them: read, checked, and made into layers beside a model's modules."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ConfigError, ModelUnavailable
from ..graph.adapters import AdapterInfo, check_name
from .adapters import NAME, Adapter, attach, undisturbed
from .partial_loading import Keep

_MARK = "lora_"
"""What every weight of such a layer has in its name."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PLAIN = frozenset(
    {
        *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
        *("fan_in_fan_out", "use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
        *("use_dora", "lora_bias", "init_lora_weights", "loftq_config", "eva_config", "runtime_config"),
    }
)
"""Settings that say which layers there are and what they compute. Others change the model itself, or are of kinds
of adapter that look at more than a layer's input."""

_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""How training began, where that left the model's own weights alone."""


def _every(name: str) -> bool:
    return True


def load(
    model: nn.Module,
    name: str,
    source: str | Path,
    *,
    keep: Keep = _every,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Adapter:
    """An adapter from a folder that `save_pretrained` wrote, or a hub id, for a model in eval mode.

    Args:
        model: all of its tree. Of modules that aren't kept the weights may be on meta; they get no layers, and of
            the adapter's file what concerns them isn't read.
        keep: asked for the parameters of modules, by full names.

    Raises:
        ConfigError: no such folder, not a LoRA adapter that can stand beside a model, or not one of this model.
        ModelUnavailable: the hub doesn't give it.
    """
    check_name(name)
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConfigError(
            'adapters need the library peft; install it with: pip install "interpose[local]"'
        ) from error
    folder = _folder(name, source, revision, local_files_only)
    config = _config(name, folder)
    try:
        weights = _weights(name, folder, model, keep)
        with undisturbed(model) as layers:
            wrapped: Any = peft.PeftModel(model, config, NAME)
            told: Any = peft.set_peft_model_state_dict(wrapped, weights, adapter_name=NAME)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ConfigError(f"adapter {name!r} doesn't fit the model: {_first_line(error)}") from error
    if parameters := config.target_parameters:  # into which the library may have turned modules that it has fused
        raise _too_much(name, "target_parameters", sorted(parameters))
    missing = [key for key in told.missing_keys if _MARK in key]
    if missing or told.unexpected_keys:
        first = [*told.unexpected_keys, *missing][0]
        raise ConfigError(f"adapter {name!r} isn't of this model, or lacks weights: {first}")
    paths = {module: path for path, module in model.named_modules()}
    for module, layer in layers.items():
        if not hasattr(layer, "lora_A") or not hasattr(layer, "scaling"):
            raise ConfigError(
                f"adapter {name!r} puts {type(layer).__name__} at {paths[module]}, which isn't LoRA's"
            )
    kept = {module: layer for module, layer in layers.items() if keep(f"{paths[module]}.weight")}
    for module, layer in kept.items():
        if any(weight.is_meta for weight in (*module.parameters(), *layer.parameters())):
            raise ConfigError(f"adapter {name!r}: the weights of {paths[module]} aren't in this process's memory")
        layer.eval().requires_grad_(False)
    attach(kept)
    ends = {paths[module].rpartition(".")[2] for module in layers}
    rank = max((layer.r[NAME] for layer in layers.values()), default=0)
    return Adapter(AdapterInfo(rank, tuple(sorted(ends)), len(layers), _revision(folder)), kept)


def _folder(name: str, source: str | Path, revision: str | None, local_files_only: bool) -> Path:
    path = Path(source).expanduser()
    text = str(source)
    if not path.is_dir():
        if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
            raise ConfigError(f"adapter {name!r}: there is no folder {text!r}; give one, or a hub id 'org/name'")
        path = _from_hub(name, text, revision, local_files_only)
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            pickled = (path / "adapter_model.bin").is_file() and file == WEIGHTS
            why = "; its weights are a pickle, which is never read: save them with safetensors" if pickled else ""
            raise ConfigError(f"adapter {name!r}: {text} holds no {file}{why}")
    return path


def _from_hub(name: str, source: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=[CONFIG, WEIGHTS], local_files_only=local_files_only
            )
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelUnavailable(f"adapter {name!r} can't be loaded from {source}: {_first_line(error)}") from error


def _config(name: str, folder: Path) -> Any:
    from peft import LoraConfig, PeftConfig

    try:
        plain = json.loads((folder / CONFIG).read_text("utf-8"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is refused
            config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ConfigError(f"adapter {name!r}: {CONFIG} can't be read: {_first_line(error)}") from error
    if type(config) is not LoraConfig:
        raise ConfigError(f"adapter {name!r} is {plain.get('peft_type')}; only LoRA can be chosen by a run")
    usual, given = asdict(LoraConfig()), asdict(config)
    odd = [key for key, value in given.items() if key not in _PLAIN and not _alike(value, usual.get(key))]
    if config.init_lora_weights not in _STARTS:
        odd.append("init_lora_weights")
    if odd:
        raise _too_much(name, odd[0], getattr(config, odd[0]))
    return config


def _alike(value: Any, usual: Any) -> bool:
    """The library writes down empty lists where nothing was given."""
    return bool(value == usual or (usual is None and value in ([], {}, set())))


def _too_much(name: str, setting: str, value: Any) -> ConfigError:
    return ConfigError(
        f"adapter {name!r} has {setting}={value!r}, with which it changes more than what "
        "single layers make; only plain LoRA (rsLoRA and DoRA too) can be chosen by a run"
    )


def _weights(name: str, folder: Path, model: nn.Module, keep: Keep) -> dict[str, Tensor]:
    """The weights of its layers, views of the file that are read when they are touched.

    What is saved with them of the model itself must be the model's; of what isn't kept, whoever has it looks.
    """
    weights = load_file(folder / WEIGHTS)
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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")[:300]
