"""What quantised weights take, by the schemes of the transformers library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interpose.errors import ConfigError
from interpose.runtime.quantized import SCHEMES
from torch import Tensor, nn
from transformers import PretrainedConfig

_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "bitsandbytes_8bit": 8.0, "bitsandbytes_4bit": 4.5, "mxfp4": 4.25}
"""Bits of a weight, the scales of its group included."""

_GROUPED = {"gptq", "awq", "auto-round", "hqq"}
"""Those that say their bits and the size of a group, which has a scale and a zero of 16 bits each."""


@dataclass(frozen=True)
class Scheme:
    """Attributes:
    name: of the scheme.
    bits: of a weight; None for a scheme nobody counts here, whose weights count as if they weren't quantised.
    skipped: parts of names of modules that stay as they are.
    """

    name: str
    bits: float | None
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: PretrainedConfig, chosen: str | None) -> Scheme | None:
        """What a config says, or a choice for one that says nothing. Raises ConfigError for another name."""
        saved = getattr(config, "quantization_config", None)
        if saved is not None:
            return cls._saved(saved if isinstance(saved, dict) else saved.to_dict())
        if chosen is None:
            return None
        if chosen not in SCHEMES:
            raise ConfigError(f"no quantization {chosen!r}; there are {', '.join(SCHEMES)}")
        return cls(chosen, _BITS[chosen])

    @classmethod
    def _saved(cls, plain: dict[str, Any]) -> Scheme:
        method = str(plain.get("quant_method", ""))
        if method == "bitsandbytes":
            method = "bitsandbytes_8bit" if plain.get("load_in_8bit") else "bitsandbytes_4bit"
        bits = _BITS.get(method)
        if method in _GROUPED and isinstance(plain.get("bits"), int):
            group = plain.get("group_size") or 128
            bits = plain["bits"] + (32 / group if group > 0 else 0)
        return cls(method, bits, tuple(plain.get("modules_to_not_convert") or ()))

    def nbytes(self, model: nn.Module, name: str, tensor: Tensor) -> int:
        """Of a block's parameter or buffer."""
        if self.bits is None or not self._converts(model, name, tensor):
            return tensor.nbytes
        return int(tensor.numel() * self.bits / 8)

    def _converts(self, model: nn.Module, name: str, tensor: Tensor) -> bool:
        """Weights of linear layers, and experts that lie behind one another."""
        if any(part in name for part in self.skipped):
            return False
        owner = model.get_submodule(name.rpartition(".")[0])
        return tensor.ndim == 3 or (tensor.ndim == 2 and isinstance(owner, nn.Linear))
