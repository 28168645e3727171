"""The options of a generation: which there are, and what they take."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import BadArgument
from .model import Run

DEFAULT_NEW_TOKENS = 20


def _whole(low: int, high: int = 1 << 20) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, (list, tuple))
        and len(texts) <= 16
        and all(isinstance(text, str) and 0 < len(text) <= 256 for text in texts)
    )


def _ids(value: Any) -> bool:
    ids = [value] if type(value) is int else value
    return (
        isinstance(ids, (list, tuple))
        and 0 < len(ids) <= 64
        and all(type(item) is int and item >= -1 for item in ids)
    )


OPTIONS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": ("a whole number from 1", _whole(1)),
    "min_new_tokens": ("a whole number from 0", _whole(0)),
    "do_sample": ("True or False", lambda value: type(value) is bool),
    "temperature": ("a number above 0", _number(1e-6, 1e6)),
    "top_k": ("a whole number from 0", _whole(0)),
    "top_p": ("a number from 0 to 1", _number(0.0, 1.0)),
    "min_p": ("a number from 0 to 1", _number(0.0, 1.0)),
    "typical_p": ("a number from 0 to 1", _number(0.0, 1.0)),
    "repetition_penalty": ("a number above 0", _number(1e-6, 1e6)),
    "no_repeat_ngram_size": ("a whole number from 0", _whole(0, 1024)),
    "seed": ("a whole number", _whole(0, (1 << 63) - 1)),
    "stop_strings": ("a text or up to 16 of them", _texts),
    "eos_token_id": ("a token id or a list of them", _ids),
    "stream": ("True or False here, or a function in model.generate", lambda value: type(value) is bool),
}
"""Option -> what it takes, in words and as a test. Names and meanings are the transformers library's.

`stream` is ours: whether each new token is told of while the generation runs.
"""


def check_options(options: Mapping[str, Any]) -> None:
    """Raises BadArgument at an option that isn't one, or has no such value."""
    for name, value in options.items():
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, list(OPTIONS), 2, 0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(OPTIONS)}"
            raise BadArgument(f"generate has no option {name!r}{hint}")
        words, fits = OPTIONS[name]
        if value is not None and not fits(value):
            raise BadArgument(f"{name} takes {words}, not {value!r}")


def new_tokens(run: Run) -> int:
    """The most tokens a run may add to each row; 0 for a trace."""
    if run.kind != "generate":
        return 0
    given: int = run.options.get("max_new_tokens") or DEFAULT_NEW_TOKENS
    return given
