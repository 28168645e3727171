"""Weights quantised as they are loaded, by the transformers library's own schemes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import BitsAndBytesConfig, FineGrainedFP8Config

from ..errors import ConfigError

_bits_and_bytes: Callable[..., Any] = BitsAndBytesConfig

SCHEMES: dict[str, Callable[[], Any]] = {
    "bitsandbytes_8bit": lambda: _bits_and_bytes(load_in_8bit=True),
    "bitsandbytes_4bit": lambda: _bits_and_bytes(load_in_4bit=True),
    "fp8": FineGrainedFP8Config,
}
"""Name -> what the library takes. The first two need the bitsandbytes package, fp8 a GPU that computes in it."""


def scheme(name: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a scheme; none for None. Raises ConfigError."""
    if name is None:
        return {}
    if name not in SCHEMES:
        raise ConfigError(f"no quantization {name!r}; there are {', '.join(SCHEMES)}")
    try:
        return {"quantization_config": SCHEMES[name]()}
    except ImportError as error:
        raise ConfigError(f"quantization {name} can't be had here: {error}") from error
