"""What a user may run a model on, as an invoke."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..errors import BadArgument
from ..graph.model import Invoke

Tokenize: TypeAlias = Callable[[str], list[int]]


def to_invoke(prompt: Any, tokenize: Tokenize) -> Invoke:
    """An invoke of a prompt.

    Args:
        prompt: a text, token ids, or a list of either; an integer tensor or array [seq] or [batch, seq]; or what a
            tokenizer returns: a mapping with `input_ids` and perhaps `attention_mask`, whose padding is taken off.
        tokenize: text -> ids, special tokens added as the model expects them.

    Raises:
        BadArgument: it is none of these, or has no tokens.
    """
    if isinstance(prompt, Invoke):
        return prompt
    text = _texts(prompt)
    if text:
        return _checked(Invoke(tuple(tuple(tokenize(line)) for line in text), text=text))
    if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids"):
        return _from_mapping(prompt)
    return _checked(Invoke(_rows(prompt)))


def _texts(prompt: Any) -> tuple[str, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(item, str) for item in prompt):
        return tuple(prompt)
    return ()


def _from_mapping(prompt: Any) -> Invoke:
    given = dict(prompt)
    rows = _rows(given.pop("input_ids", None))
    mask = given.pop("attention_mask", None)
    given.pop("token_type_ids", None)
    if given:
        raise BadArgument(f"inputs beside input_ids and attention_mask aren't taken yet: {', '.join(given)}")
    if mask is not None:
        keep = _rows(mask)
        if [len(row) for row in keep] != [len(row) for row in rows]:
            raise BadArgument("attention_mask has another shape than input_ids")
        rows = tuple(
            tuple(token for token, real in zip(row, flags, strict=True) if real)
            for row, flags in zip(rows, keep, strict=True)
        )
    return _checked(Invoke(rows))


def _rows(ids: Any) -> tuple[tuple[int, ...], ...]:
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


def _checked(invoke: Invoke) -> Invoke:
    if not invoke.rows or not all(invoke.rows):
        raise BadArgument("a prompt has no tokens")
    if any(token < 0 for row in invoke.rows for token in row):
        raise BadArgument("a token id is negative")
    return invoke
