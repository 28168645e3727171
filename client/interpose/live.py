"""Tokens as text while a generation runs: each piece as soon as it makes whole characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .graph.model import Graph
from .wire.stream import NewTokens

_CONTEXT = 8
"""Tokens before the new one whose text may change how it reads: a space, half a character."""

_HELD = 4
"""A character is at most so many bytes, so what is still broken after as many tokens stays so."""


@dataclass(frozen=True, slots=True)
class NewText:
    """One step of a generation.

    Attributes:
        ids: the new token of each row, None for rows that had ended.
        texts: what became readable in each row; empty in the middle of a character.
        attempt: higher than before if the job had to begin again, from step 0.
    """

    run: int
    step: int
    ids: tuple[int | None, ...]
    texts: tuple[str, ...]
    attempt: int = 0

    @property
    def text(self) -> str:
        """Of the only row, or the first."""
        return self.texts[0] if self.texts else ""

    def __str__(self) -> str:
        return self.text


class Live:
    """Tells a function of each step of a graph's generations, with its text. `tokenizer` None: without."""

    def __init__(self, tell: Callable[[NewText], None], graph: Graph, tokenizer: Any) -> None:
        self._tell = tell
        self._prompts = [[row for invoke in run.invokes for row in invoke.rows] for run in graph.runs]
        self._tokenizer = tokenizer
        self._attempt = -1
        self._rows: list[list[Reader]] = []

    def take(self, event: NewTokens) -> None:
        if event.attempt > self._attempt:
            self._attempt = event.attempt
            self._rows = [[Reader(self._tokenizer, row) for row in rows] for rows in self._prompts]
        rows = self._rows[event.run]
        texts = tuple("" if token is None else row.take(token) for row, token in zip(rows, event.ids, strict=True))
        self._tell(NewText(event.run, event.step, event.ids, texts, event.attempt))


class Reader:
    """One row's text, token by token. Special tokens have none."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._read = len(self._ids)

    def take(self, token: int) -> str:
        """What became readable with this token."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        before, after = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if after.endswith("\ufffd") and len(self._ids) - self._read < _HELD:
            return ""
        self._ids = self._ids[max(self._read - _CONTEXT, 0) :]
        self._read = len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
