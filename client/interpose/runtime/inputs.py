"""What a model is fed: rows of several runs in one padded batch, and the arguments its forward takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadArgument
from ..graph.inputs import IMAGE, Input

_IDS = ("token_id", "image_token_index", "video_token_index")
"""How a config's names of special tokens end."""

FILL = 0
"""The token in padded places. Any id will do, as the mask hides it; this one every vocabulary has."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One batch.

    Attributes:
        input_ids, attention_mask, position_ids: [rows, width], int64. Positions count real tokens, from 0.
        widths: for each run the length of its span, which starts at position 0 of the batch.
        rows: for each run how many rows it has, in order.
        padded: whether any place holds no token.
        tensors: what is given beside token ids, by name.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    padded: bool
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def batch_inputs(rows: Sequence[Sequence[Sequence[int]]], device: torch.device | str = "cpu") -> ModelInputs:
    """One batch of several runs.

    Rows of one run are padded on the left to the run's longest, so that its last position is every row's last
    token; runs are padded on the right to the longest run, which no causal row can see.

    Args:
        rows: for each run its rows of token ids; all of them empty for a model that takes none.

    Raises:
        BadArgument: there is no row, or one has no token while others do.
    """
    lengths = [len(row) for run in rows for row in run]
    if not lengths or (0 in lengths and any(lengths)):
        raise BadArgument("a prompt without tokens can't be run; give at least one token a row")
    widths = tuple(max(map(len, run), default=0) for run in rows)
    total = max(widths)
    ids: list[list[int]] = []
    mask: list[list[int]] = []
    for run, width in zip(rows, widths, strict=True):
        for row in run:
            left, right = width - len(row), total - width
            ids.append([FILL] * left + list(row) + [FILL] * right)
            mask.append([0] * left + [1] * len(row) + [0] * right)
    attention_mask = torch.tensor(mask, dtype=torch.int64, device=device).view(len(lengths), total)
    return ModelInputs(
        input_ids=torch.tensor(ids, dtype=torch.int64, device=device).view(len(lengths), total),
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        widths=widths,
        rows=tuple(map(len, rows)),
        padded=any(0 in row for row in mask),
    )


def positions(attention_mask: Tensor) -> Tensor:
    """How many real tokens come before each place of its row."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True, slots=True)
class Feeding:
    """How one model wants to be fed, as measured.

    Attributes:
        accepts: parameter names of its forward.
        stated: positions are given even without padding: it looks them up in a table, and left alone would do so
            once for all rows.
        offset: what it adds to positions before its table, so what we must add when we give them (RoBERTa counts
            from its padding id); None if it takes no positions from outside.
        note: why nothing is known to run it on, "" if something is.
        ids: whether it takes token ids.
        inputs: the tensors it takes beside them, or in their place.
        image_token, image_tokens: the id that holds an image's place, and how many places one image takes; 0 where
            that differs from image to image, and `image_patches` of them go to one place.
    """

    accepts: frozenset[str]
    offset: int | None = None
    note: str = ""
    stated: bool = False
    ids: bool = True
    inputs: Mapping[str, Input] = field(default_factory=dict)
    image_token: int | None = None
    image_tokens: int = 0
    image_patches: int = 0

    @property
    def works(self) -> bool:
        """Whether we know what to run it on."""
        return not self.note

    @property
    def images(self) -> str:
        """The input that holds images, which belong to rows by the place of their tokens; "" without one."""
        return next((name for name, one in self.inputs.items() if one.dims[0] == IMAGE), "")

    def kwargs(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """The keyword arguments of the forward for a batch.

        Without padding the result is bitwise that of what a tokenizer would give; with padding the positions are
        stated too, as most models would count padded places.
        """
        kwargs = dict(inputs.tensors)
        if not self.ids:
            return kwargs
        kwargs["input_ids"] = inputs.input_ids
        if "attention_mask" in self.accepts:
            kwargs["attention_mask"] = inputs.attention_mask
        if (inputs.padded or self.stated) and self.states(inputs.tensors):
            kwargs["position_ids"] = inputs.position_ids + (self.offset or 0)
        return kwargs

    def states(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether positions may be stated: not where the model makes its own of the images' sizes."""
        own = any(self.inputs[name].free for name in tensors if name in self.inputs)
        return self.offset is not None and not own


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter lies that has its numbers; the CPU for a model without one."""
    return next((param.device for param in model.parameters() if not param.is_meta), torch.device("cpu"))


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids a model takes, None if it takes none."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        table = None
    if isinstance(table, Tensor) and table.dim() == 2:
        return len(table)
    size = getattr(text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def text_config(model: nn.Module) -> Any:
    """The part of a model's config that concerns text."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def sample_rows(model: nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Rows of ordinary token ids to try a model on: fixed, scattered, no special token of its config among them."""
    special = {
        token
        for config in {id(c): c for c in (getattr(model, "config", None), text_config(model))}.values()
        for token in _special(config)
    }
    ordinary = [token for token in range(min(vocabulary(model) or 64, 4096)) if token not in special]
    return [
        [ordinary[(31 * row + 17 * place * (row + 1) + 7) % len(ordinary)] for place in range(length)]
        for row, length in enumerate(lengths)
    ]


def _special(config: Any) -> list[Any]:
    named = [value for name, value in vars(config).items() if name.endswith(_IDS)] if config else []
    return [token for value in named for token in (value if isinstance(value, (list, tuple)) else (value,))]


def principal(output: Any) -> Tensor:
    """The tensor a model's output is about: its logits, else its last hidden state, else its first tensor.

    Raises:
        BadArgument: there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in ("logits", "last_hidden_state"):
            found = output.get(name)
            if isinstance(found, Tensor):
                return found
        output = tuple(output.values())
    for item in output if isinstance(output, (tuple, list)) else ():
        if isinstance(item, Tensor):
            return item
    raise BadArgument(f"a model whose output is a {type(output).__name__} without tensors can't be served")
