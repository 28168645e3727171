"""What a model is fed: token rows of several runs in one padded batch, and the arguments its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadArgument

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
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    padded: bool


def batch_inputs(rows: Sequence[Sequence[Sequence[int]]], device: torch.device | str = "cpu") -> ModelInputs:
    """One batch of several runs.

    Rows of one run are padded on the left to the run's longest, so that its last position is every row's last
    token; runs are padded on the right to the longest run, which no causal row can see.

    Args:
        rows: for each run its rows of token ids.

    Raises:
        BadArgument: there is no row, or one has no token.
    """
    if not any(rows) or not all(row for run in rows for row in run):
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
    attention_mask = torch.tensor(mask, dtype=torch.int64, device=device)
    return ModelInputs(
        input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
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
        note: why it doesn't run on token ids alone, "" if it does.
    """

    accepts: frozenset[str]
    offset: int | None = None
    note: str = ""
    stated: bool = False

    @property
    def tokens(self) -> bool:
        """Whether it runs on token ids alone."""
        return not self.note

    def kwargs(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """The keyword arguments of the forward for a batch.

        Without padding the result is bitwise that of what a tokenizer would give; with padding the positions are
        stated too, as most models would count padded places.
        """
        kwargs = {"input_ids": inputs.input_ids}
        if "attention_mask" in self.accepts:
            kwargs["attention_mask"] = inputs.attention_mask
        if (inputs.padded or self.stated) and self.offset is not None:
            kwargs["position_ids"] = inputs.position_ids + self.offset
        return kwargs


class Fed(Protocol):
    """A loaded model, as far as feeding it goes."""

    @property
    def feeding(self) -> Feeding: ...


def call_kwargs(loaded: Fed, inputs: ModelInputs) -> dict[str, Tensor]:
    """The keyword arguments of the model's forward for a batch."""
    return loaded.feeding.kwargs(inputs)


@torch.no_grad()
def measure_feeding(model: nn.Module, device: torch.device | str) -> Feeding:
    """What `model` wants: read from its signature, the position offset found by comparing runs."""
    accepts = frozenset(inspect.signature(model.forward).parameters)
    feeding = Feeding(accepts)
    if "input_ids" not in accepts:
        return Feeding(accepts, note="its forward takes no input_ids")
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    inputs = batch_inputs([sample_rows(model, [6])], device)
    plain = feeding.kwargs(inputs)
    try:
        expected = principal(model(**plain)).float()
    except Exception as error:  # noqa: BLE001 - a model's own forward may raise anything, and loading goes on
        return Feeding(accepts, note=f"its forward fails on token ids alone: {error}")
    if "position_ids" not in accepts:
        return feeding
    for offset in (0, *([pad + 1] if isinstance(pad, int) else [])):
        given = principal(model(**plain, position_ids=inputs.position_ids + offset)).float()
        if torch.allclose(given, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            stated = torch.equal(given, expected) and _looks_up_once(model, device, feeding)
            return Feeding(accepts, offset, stated=stated)
    return feeding


def _looks_up_once(model: nn.Module, device: torch.device | str, feeding: Feeding) -> bool:
    """Whether some table of the model is looked up for one row, where there are several."""
    found: list[int] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        found.append(len(output))

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        model(**feeding.kwargs(batch_inputs([sample_rows(model, [3, 3])], device)))
    finally:
        for handle in handles:
            handle.remove()
    return 1 in found


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids a model takes, None if it takes none."""
    if not isinstance(model, PreTrainedModel):
        return None
    table = getattr(model.get_input_embeddings(), "weight", None)
    return len(table) if isinstance(table, Tensor) else None


def sample_rows(model: nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Rows of ordinary token ids to try a model on: fixed, scattered, no special token of its config among them."""
    config = getattr(model, "config", None)
    named = [value for name, value in vars(config).items() if name.endswith("token_id")] if config else []
    special = {token for value in named for token in (value if isinstance(value, (list, tuple)) else (value,))}
    ordinary = [token for token in range(min(vocabulary(model) or 64, 4096)) if token not in special]
    return [
        [ordinary[(31 * row + 17 * place * (row + 1) + 7) % len(ordinary)] for place in range(length)]
        for row, length in enumerate(lengths)
    ]


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
