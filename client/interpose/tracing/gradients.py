"""Gradients as the language shows them: `h.grad` inside `with loss.backward():`, and after the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..graph.values import Ref

if TYPE_CHECKING:
    from .recorder import Recorder


@dataclass
class GradientBase:
    """The gradient of a value in one backward. Writing it changes what goes on upstream."""

    recorder: Recorder
    target: int
    backward: int
    _current: int | None = None

    def node(self) -> int:
        if self._current is None:
            self._current = self.recorder.node("grad", (Ref(self.target), Ref(self.backward)))
        return self._current

    def write(self, chain: tuple[Any, ...], index: Any, value: Any) -> None:
        self.recorder.node("set_grad", (Ref(self.target), Ref(self.backward), chain, index, value))
        self._current = None


class Backward:
    """What `loss.backward()` gives: a block in which gradients can be read and replaced."""

    def __init__(self, recorder: Recorder, node: int) -> None:
        self._recorder, self._node = recorder, node

    def __enter__(self) -> Backward:
        self._recorder.backward = self._node
        return self

    def __exit__(self, *error: object) -> None:
        return None
