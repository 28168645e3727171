"""Gradients as the language shows them: `h.grad` inside `with loss.backward():`, and after the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BadArgument, Source
from ..graph.values import Ref
from .source import caller

if TYPE_CHECKING:
    from .bases import Value
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


@dataclass
class EarlyGradient:
    """The gradient of a value in the next backward, named before it: all that can be done is to save it."""

    gradients: Gradients
    target: Value

    def keep(self, gradient: Any) -> Any:
        self.gradients.early.append((self.target, gradient, caller()))
        return gradient

    def node(self) -> int:
        raise BadArgument("gradients exist once a loss runs backward: with loss.backward(): h.grad")

    def write(self, chain: tuple[Any, ...], index: Any, value: Any) -> None:
        self.node()


class Gradients:
    """The gradients asked for in one recorded job.

    Attributes:
        backward: the backward node whose gradients `.grad` names.
        early: values whose gradient was saved before any backward, that gradient, and its line.
        saved: save nodes of retained gradients, and the values they are the gradients of.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.backward: int | None = None
        self.early: list[tuple[Value, Any, Source]] = []
        self.saved: list[tuple[int, Any]] = []
        self._retained: list[Any] = []
        self._bases: dict[tuple[int, int], GradientBase] = {}

    def retain(self, value: Value) -> None:
        """Ask for a value's gradient: after the block it is its `.grad`."""
        self._recorder.ref(value)
        self._retained.append(value)

    def start(self, loss: Value) -> Backward:
        """Record a backward; the gradients retained so far are kept."""
        recorder = self._recorder
        self.backward = recorder.node("backward", (Ref(recorder.ref(loss)),))
        for value in self._retained:
            gradient = self.of(value)
            self.saved.append((recorder.node("save", (Ref(recorder.ref(gradient)),)), value))
        early, self.early = self.early, []
        for value, kept, _ in early:
            recorder.keep(recorder.ref(self.of(value)), kept)
        return Backward(self, self.backward)

    def check(self) -> None:
        """Raises BadArgument if a gradient is still without a loss when its block ends."""
        early, self.early = self.early, []
        for *_, line in early:
            raise BadArgument("no loss ran backward after this: with loss.backward(): h.grad", source=line)

    def of(self, value: Value) -> Any:
        """The gradient of a value in the current backward, deferred."""
        if self.backward is None:
            return self._recorder.make(self._recorder, EarlyGradient(self, value), (), self._recorder.ref(value))
        if getattr(value._root, "computed", False):
            raise BadArgument(
                "the model doesn't make this tensor itself, so no gradient comes to it; take that of a value it is "
                "computed from"
            )
        recorder, target = self._recorder, value._root.node()
        base = self._bases.setdefault((target, self.backward), GradientBase(recorder, target, self.backward))
        node = base.node()
        for name, *args in value._chain:
            node = recorder.node(name, (Ref(node), *args))
        return recorder.make(recorder, base, value._chain, node)


class Backward:
    """What `loss.backward()` gives: a block in which gradients can be read and replaced."""

    def __init__(self, gradients: Gradients, node: int) -> None:
        self._gradients, self._node = gradients, node

    def __enter__(self) -> Backward:
        self._gradients.backward = self._node
        return self

    def __exit__(self, *error: object) -> None:
        return None
