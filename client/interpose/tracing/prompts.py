"""What a user may run a model on, as an invoke."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise
from typing import Any, TypeAlias

import numpy as np

from ..errors import BadArgument, ShapeMismatch
from ..graph.inputs import SEQ, TOKENS, check_values
from ..graph.manifest import Manifest
from ..graph.model import Invoke

Tokenize: TypeAlias = Callable[[str], list[int]]


@dataclass(frozen=True)
class Prompt:
    """What one invoke runs on.

    Attributes:
        invoke: its rows; its tensors aren't named yet.
        tensors: those given beside token ids, or in their place, by the name of the input.
    """

    invoke: Invoke
    tensors: Mapping[str, Any] = field(default_factory=dict)


def to_prompt(
    prompt: Any, tokenize: Tokenize, manifest: Manifest, given: Mapping[str, Any] | None = None
) -> Prompt:
    """What a user wrote, as what a model takes.

    Args:
        prompt: a text, token ids, or a list of either; an integer tensor or array [seq] or [batch, seq]; for a
            model that takes one tensor and no ids, that tensor; or what a tokenizer or processor returns: a mapping
            of inputs by name, whose padding is taken off. None if `given` says all.
        tokenize: text -> ids, special tokens added as the model expects them.
        given: further inputs by name.

    Raises:
        BadArgument: it is none of these, has no tokens, or names an input the model doesn't take.
    """
    inputs = dict(given or {})
    if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids"):
        inputs = {**dict(prompt), **inputs}
    elif prompt is not None and not manifest.tokens:
        if len(manifest.inputs) != 1:
            raise BadArgument(f"{manifest.model} takes inputs by name: {', '.join(manifest.inputs)}")
        inputs = {next(iter(manifest.inputs)): prompt, **inputs}
    elif prompt is not None:
        text = texts(prompt)
        rows = tuple(tuple(tokenize(line)) for line in text) if text else token_rows(prompt)
        return _with_tensors(Invoke(rows, text=text), inputs, manifest, None)
    mask = inputs.pop("attention_mask", None) if manifest.tokens else None
    if manifest.tokens and inputs.get("input_ids") is None:
        raise BadArgument(f"the prompt has no input_ids, only {', '.join(inputs) or 'nothing'}")
    rows = token_rows(inputs.pop("input_ids")) if manifest.tokens else ((),) * _count(inputs)
    return _with_tensors(Invoke(rows), inputs, manifest, _kept(rows, mask))


def _count(inputs: Mapping[str, Any]) -> int:
    """How many rows there are, from inputs of a model that takes no ids."""
    shape = next((tuple(tensor.shape) for tensor in inputs.values() if hasattr(tensor, "shape")), ())
    return shape[0] if shape else 0


def _kept(rows: tuple[tuple[int, ...], ...], mask: Any) -> list[list[bool]] | None:
    """Which places of each row hold tokens; None for all. Only padding before or after a row can be taken off."""
    if mask is None:
        return None
    try:
        keep = [list(map(bool, row)) for row in token_rows(mask)]
    except BadArgument:
        raise BadArgument("attention_mask holds whole numbers or bools, [seq] or [batch, seq]") from None
    if [len(row) for row in keep] != [len(row) for row in rows]:
        raise BadArgument("attention_mask has another shape than input_ids")
    if any(sum(a != b for a, b in pairwise([False, *row, False])) > 2 for row in keep):
        raise BadArgument("attention_mask hides tokens within a row; here it marks padding before or after one")
    return keep


def _with_tensors(
    invoke: Invoke, tensors: Mapping[str, Any], manifest: Manifest, keep: list[list[bool]] | None
) -> Prompt:
    if keep is not None:
        rows = (compress(row, flags) for row, flags in zip(invoke.rows, keep, strict=True))
        invoke = Invoke(tuple(map(tuple, rows)), text=invoke.text)
    _check(invoke, manifest)
    made = {}
    for name, tensor in tensors.items():
        if name in TOKENS and manifest.tokens:
            raise BadArgument(f"{name} comes within the prompt: {{'input_ids': ..., 'attention_mask': ...}}")
        if name not in manifest.inputs:
            takes = [*(TOKENS if manifest.tokens else ()), *manifest.inputs]
            raise BadArgument(f"{manifest.model} takes no input {name!r}; it takes {', '.join(takes)}")
        one = manifest.inputs[name]
        if not hasattr(tensor, "shape"):
            tensor = np.asarray(tensor)
        if SEQ in one.dims and len(one.dims) == 2:
            tensor = _aligned(name, tensor, invoke, keep)
        if one.below is not None and math.prod(tensor.shape):
            check_values(name, one, int(tensor.min()), int(tensor.max()))
        made[name] = tensor
    return Prompt(invoke, made)


def _aligned(name: str, tensor: Any, invoke: Invoke, keep: list[list[bool]] | None) -> np.ndarray[Any, Any]:
    """Figures of each token, [rows, longest], padded on the left as the rows are."""
    values = np.asarray(tensor.detach().cpu() if hasattr(tensor, "detach") else tensor)
    values = values[None] if values.ndim == 1 else values
    width = len(keep[0]) if keep else invoke.longest
    if values.shape != (len(invoke.rows), width):
        raise ShapeMismatch(f"{name} has shape {list(values.shape)}, where {[len(invoke.rows), width]} is expected")
    if keep is None and any(len(row) != width for row in invoke.rows):
        raise BadArgument(f"{name} beside rows of different lengths needs the attention_mask that padded them")
    made = np.zeros((len(invoke.rows), invoke.longest), values.dtype)
    for index, row in enumerate(invoke.rows):
        made[index, invoke.longest - len(row) :] = values[index][np.array(keep[index])] if keep else values[index]
    return made


def texts(prompt: Any) -> tuple[str, ...]:
    """The lines of a prompt that is a text, or a list of texts; none of another."""
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(item, str) for item in prompt):
        return tuple(prompt)
    return ()


def token_rows(ids: Any) -> tuple[tuple[int, ...], ...]:
    """Rows of token ids, from ids, a list of rows, or an integer tensor or array. Raises BadArgument."""
    if hasattr(ids, "detach"):
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, np.ndarray):
        if ids.ndim not in (1, 2) or (not np.issubdtype(ids.dtype, np.integer) and ids.dtype != np.bool_):
            raise BadArgument(f"token ids are integers [seq] or [batch, seq], not {ids.dtype}{list(ids.shape)}")
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise BadArgument(f"a prompt is text, token ids, or a list of either, not {type(ids).__name__}")
    if ids and all(_whole(item) for item in ids):
        ids = [ids]
    if not all(isinstance(row, Sequence) and all(map(_whole, row)) for row in ids):
        raise BadArgument("a prompt is text, token ids, or a list of either; this list mixes or nests them")
    return tuple(tuple(int(token) for token in row) for row in ids)


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer))


def _check(invoke: Invoke, manifest: Manifest) -> None:
    if not invoke.rows or (manifest.tokens and not all(invoke.rows)):
        raise BadArgument("a prompt has no tokens" if manifest.tokens else "nothing to run: no rows were given")
    if any(token < 0 for row in invoke.rows for token in row):
        raise BadArgument("a token id is negative")
