"""Where a model comes from: a hub id or a folder, its config, and the library's class for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from transformers import AutoConfig, PretrainedConfig

from ..errors import ConfigError, ModelUnavailable, OutOfMemory, first_line
from .transformers_internals import models_of
from .unavailable import reason

T = TypeVar("T")

HUB_S = 10.0
"""How long the hub may take to say whether it has a model."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

ODD = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)
"""What the library raises of a config that makes no sense."""

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


@dataclass(frozen=True)
class Source:
    """A hub id, or a folder that holds a config.json.

    Attributes:
        place: what the library is given.
        folder: the folder, None for a hub id.
        hub: keyword arguments for whatever the library fetches from there. Code that comes with a model is never
            run.
    """

    place: str
    folder: Path | None
    hub: dict[str, Any]

    @classmethod
    def of(cls, source: str | Path, revision: str | None = None, *, local_files_only: bool = False) -> Source:
        """What the hub can't be asked for now is taken from what is kept of it.

        Raises:
            ConfigError: it is neither a folder of a model nor looks like a hub id.
            ModelUnavailable: the hub has no such model, or can't be reached and nothing is kept.
        """
        folder = _folder(source)
        hub: dict[str, Any] = {
            "local_files_only": local_files_only or folder is not None,
            "trust_remote_code": False,
        }
        if folder is None:
            hub["revision"] = revision
            hub["local_files_only"] = local_files_only or not _hub_answers(str(source), revision)
        return cls(str(folder or source), folder, hub)

    def config(self) -> PretrainedConfig:
        """Raises ConfigError, ModelUnavailable."""
        try:
            config: PretrainedConfig = self.fetch(lambda: AutoConfig.from_pretrained(self.place, **self.hub))
        except ODD as error:
            raise ConfigError(f"{self.place} can't be loaded: its config: {first_line(error)}") from error
        return config

    def fixed(self, config: PretrainedConfig) -> Source:
        """The same, of the hub's very commit that a config came from."""
        commit = getattr(config, "_commit_hash", None)
        return self if self.folder or not commit else replace(self, hub={**self.hub, "revision": commit})

    def fetch(self, get: Callable[[], T]) -> T:
        """What the library gives, its errors told as ours: ConfigError, ModelUnavailable."""
        try:
            return get()
        except OSError as error:
            raise ModelUnavailable(
                f"{self.place} can't be loaded: {first_line(error)}. Check the name, the network, and for a gated "
                "model that you are logged in; a folder works too",
                details={"reason": reason(error) or "missing"},
            ) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise OutOfMemory(f"{self.place} doesn't fit the memory it is loaded into") from error
        except (ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ConfigError(f"{self.place} can't be loaded: {first_line(error)}") from error


def _folder(source: str | Path) -> Path | None:
    """The folder a source names, None for a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{path} holds no config.json: give the folder that save_pretrained wrote",
                details={"reason": "missing"},
            )
        return path.resolve()
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        raise ConfigError(
            f"there is no folder {text!r}; give one, or a hub id such as 'org/name'", details={"reason": "missing"}
        )
    return None


def _hub_answers(name: str, revision: str | None) -> bool:
    """Whether the hub can be asked for a model: looked for once, where loading would try for half a minute."""
    api = HfApi()
    try:
        api.model_info(name, revision=revision, timeout=HUB_S)
    except RepositoryNotFoundError as error:
        if "/" in name:
            return True  # gated, or private: loading tells which
        raise ModelUnavailable(
            f"there is no folder {name!r} here, and the hub has no model of that name",
            details={"reason": "missing"},
        ) from error
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception as error:  # noqa: BLE001 - whatever its library for HTTP raises
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return False
        asked = f"the hub ({urlsplit(api.endpoint).hostname}) can't be asked for it"
        raise ModelUnavailable(
            f"there is no folder {name!r} here, and {asked}: {first_line(error)}", details={"reason": "network"}
        ) from None
    return True


def auto_class(config: PretrainedConfig) -> Any:
    """The library's Auto class that makes the architecture a config names."""
    wanted = set(config.architectures or ())
    offers = {kind: models_of(kind, config) for kind in _KINDS}
    for kind, found in offers.items():
        if any(cls.__name__ in wanted for cls in _classes(found)):
            return kind
    # Folders of old may name none; what writes text is what people mean.
    for kind, found in offers.items():
        if found is not None:
            return kind
    raise ConfigError(f"no model class for a config of type {config.model_type!r}")


def model_class(config: PretrainedConfig) -> Any:
    """The class that `auto_class` would make of a config."""
    found = _classes(models_of(auto_class(config), config))
    wanted = set(config.architectures or ())
    return next((cls for cls in found if cls.__name__ in wanted), found[0])


def _classes(found: Any) -> tuple[Any, ...]:
    classes = found if isinstance(found, tuple) else (found,)
    return tuple(cls for cls in classes if cls is not None)


def torch_dtype(name: str | None) -> Any:
    """The dtype of a name; "auto" for "auto" and None. Raises ConfigError."""
    if name in (None, "auto"):
        return "auto"
    if name not in DTYPES:
        raise ConfigError(f"no dtype {name!r}; there are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def torch_device(name: str | None) -> torch.device:
    """A device that can be used; a GPU for None, if there is one. Raises ConfigError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} can't be used: {first_line(error)}") from error
    return device
