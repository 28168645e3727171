"""Where the files of a LoRA adapter lie, a folder or a hub's repository, and what its config says."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelUnavailable, first_line
from .unavailable import reason

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


def folder_of(
    name: str, source: str | Path, *, local_files_only: bool = False, needed: tuple[str, ...] = (CONFIG, WEIGHTS)
) -> Path:
    """The folder with an adapter's files, which come from the hub if need be.

    Args:
        source: a folder, or a hub id, `org/name` or `org/name@revision`.
        needed: the files that have to be there; no others are fetched.

    Raises:
        ConfigError: no such folder, or files that aren't there.
        ModelUnavailable: the hub doesn't give them.
    """
    path, text = Path(source).expanduser(), str(source)
    if not path.is_dir():
        repository = text.partition("@")[0]
        if isinstance(source, Path) or text.startswith((".", "/", "~")) or repository.count("/") != 1:
            raise ConfigError(
                f"adapter {name!r}: there is no folder {text!r}; give one, or a hub id 'org/name'",
                details={"reason": "missing"},
            )
        path = _from_hub(name, text, local_files_only, needed)
    for file in needed:
        if not (path / file).is_file():
            pickled = (path / "adapter_model.bin").is_file() and file == WEIGHTS
            why = "; its weights are a pickle, which is never read: save them with safetensors" if pickled else ""
            raise ConfigError(f"adapter {name!r}: {text} holds no {file}{why}", details={"reason": "missing"})
    return path


def pinned(name: str, source: str) -> str:
    """The source with the hub's very commit that it stands for now; a folder as it is. Raises as `folder_of`."""
    if Path(source).expanduser().is_dir():
        return source
    repository, _, _ = source.partition("@")
    return f"{repository}@{folder_of(name, source).name}"


def _from_hub(name: str, source: str, local_files_only: bool, needed: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = source.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=[*needed],
                local_files_only=local_files_only,
            )
        )
    except HFValidationError as error:
        told = f"adapter {name!r}: {repository!r} is no folder, nor a hub id: {first_line(error)}"
        raise ConfigError(told, details={"reason": "missing"}) from error
    except (OSError, HfHubHTTPError) as error:
        raise ModelUnavailable(
            f"adapter {name!r} can't be loaded from {source}: {first_line(error)}",
            details={"reason": reason(error) or "missing"},
        ) from error


def config_of(name: str, folder: Path) -> Any:
    """The library's config of an adapter. Raises ConfigError: it can't be read, or stand beside a model."""
    from peft import LoraConfig, PeftConfig

    try:
        plain = json.loads((folder / CONFIG).read_text("utf-8"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is refused
            config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError, ImportError, RecursionError) as error:
        raise ConfigError(f"adapter {name!r}: {CONFIG} can't be read: {first_line(error)}") from error
    if type(config) is not LoraConfig:
        raise ConfigError(f"adapter {name!r} is {plain.get('peft_type')}; only LoRA can be chosen by a run")
    usual, given = asdict(LoraConfig()), asdict(config)
    odd = [key for key, value in given.items() if key not in _PLAIN and not _alike(value, usual.get(key))]
    if config.init_lora_weights not in _STARTS:
        odd.append("init_lora_weights")
    if odd:
        raise too_much(name, odd[0], getattr(config, odd[0]))
    return config


def _alike(value: Any, usual: Any) -> bool:
    """The library writes down empty lists where nothing was given."""
    return bool(value == usual or (usual is None and value in ([], {}, set())))


def too_much(name: str, setting: str, value: Any) -> ConfigError:
    return ConfigError(
        f"adapter {name!r} has {setting}={value!r}, with which it changes more than what "
        "single layers make; only plain LoRA (rsLoRA and DoRA too) can be chosen by a run"
    )
