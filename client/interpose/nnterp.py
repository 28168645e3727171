"""nnterp's names: `from interpose.nnterp import StandardizedTransformer`.

Every model has nnterp's accessors (`layers_output[i]`, `logits`, `project_on_vocab`); here are its figures and its
two interventions too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import BadArgument
from .models import LanguageModel

__all__ = ["StandardizedTransformer"]


class StandardizedTransformer(LanguageModel):
    """A model under nnterp's names."""

    @property
    def num_layers(self) -> int:
        return len(self.manifest.blocks)

    @property
    def num_heads(self) -> int:
        return int(self.manifest.config["heads"])

    @property
    def hidden_size(self) -> int:
        return int(self.manifest.config["hidden"])

    @property
    def vocab_size(self) -> int | None:
        return self.manifest.vocab

    def steer(
        self,
        layers: int | Sequence[int],
        steering_vector: Any,
        factor: float = 1,
        positions: int | Sequence[int] | None = None,
    ) -> None:
        """Add a vector [hidden] to the hidden states that layers return, at some positions or all."""
        at = slice(None) if positions is None else [positions] if isinstance(positions, int) else list(positions)
        for layer in [layers] if isinstance(layers, int) else layers:
            self.layers[layer].resid_post[:, at] += factor * steering_vector

    def skip_layer(self, layer: int, skip_with: Any = None) -> None:
        """Leave out a layer: it returns what it was given, or `skip_with`."""
        self.skip_layers(layer, layer, skip_with)

    def skip_layers(self, start_layer: int, end_layer: int, skip_with: Any = None) -> None:
        """Leave out layers, the last of them too."""
        if not 0 <= start_layer <= end_layer < self.num_layers:
            raise BadArgument(f"layers {start_layer} to {end_layer} aren't among the model's {self.num_layers}")
        value = self.layers[start_layer].input if skip_with is None else skip_with
        for layer in range(start_layer, end_layer + 1):
            self.layers[layer].skip(value)
