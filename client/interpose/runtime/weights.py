"""The safetensors files of a checkpoint: which tensors they hold, and in which file each lies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import ConfigError, ModelUnavailable
from .sources import Source


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a checkpoint.

    Attributes:
        files: name of a tensor -> name of the file that holds it; None where one file holds all.
        metadata: of the index.
    """

    source: Source
    files: Mapping[str, str] | None
    metadata: Mapping[str, Any]

    @classmethod
    def find(cls, source: Source, config: PretrainedConfig) -> Weights:
        """Raises ConfigError where there are none, OSError of the hub."""
        named = getattr(config, "transformers_weights", None)
        if named is not None or type(config).extra_files:
            raise ConfigError(
                f"{source.place} keeps weights in files of its own naming, which can't be read by parts"
            )
        if _there(source, SAFE_WEIGHTS_NAME) is not None:
            return cls(source, None, {})
        index = _there(source, SAFE_WEIGHTS_INDEX_NAME)
        if index is None and source.folder is None and source.hub["local_files_only"]:
            raise ModelUnavailable(
                f"no weights of {source.place} are kept on this machine, and no network may be asked for them",
                details={"reason": "network"},
            )
        if index is None:
            raise ConfigError(
                f"{source.place} has no weights in safetensors, and others can't be read by parts: load it once "
                "with the transformers library and save it with save_pretrained"
            )
        plain = json.loads(Path(index).read_text("utf-8"))
        return cls(source, plain["weight_map"], plain.get("metadata") or {})

    def names(self) -> list[str]:
        if self.files is not None:
            return list(self.files)
        with safe_open(self.path(SAFE_WEIGHTS_NAME), framework="pt") as opened:
            return list(opened.keys())

    def slices(self, names: Iterable[str], stack: ExitStack) -> dict[str, Any]:
        """What reads a tensor once it is asked to, for each name; the stack closes the files."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name] if self.files is not None else SAFE_WEIGHTS_NAME, []).append(name)
        found = {}
        for file, inside_it in by_file.items():
            opened = stack.enter_context(safe_open(self.path(file), framework="pt", device="cpu"))
            found.update({name: opened.get_slice(name) for name in inside_it})
        return found

    def any_file(self) -> str:
        return self.path(next(iter(self.files.values())) if self.files else SAFE_WEIGHTS_NAME)

    def path(self, file: str) -> str:
        return _path(self.source, file)


def _path(source: Source, file: str) -> str:
    """Where a file lies, downloaded if need be. Raises OSError."""
    if source.folder is None:
        options = {key: value for key, value in source.hub.items() if key != "trust_remote_code"}
        fetched: str = hf_hub_download(source.place, file, **options)
        return fetched
    path = source.folder / file
    if not path.is_file():
        raise FileNotFoundError(f"{source.folder} holds no {file}")
    return str(path)


def _there(source: Source, file: str) -> str | None:
    """The same; None for one that isn't there. Raises OSError where that can't be told."""
    try:
        return _path(source, file)
    except LocalEntryNotFoundError:
        if source.hub["local_files_only"]:
            return None
        raise
    except (EntryNotFoundError, FileNotFoundError):
        return None
