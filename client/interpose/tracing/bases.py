"""What a deferred value holds: a base, and the views that lead from there.

What a name in the user's code stands for may change under it: a write to a hook point is seen by every view of that
point, as it would be with real tensors. So a deferred value holds no node but a base (a hook point, or a computed
value) and the views that lead from there; its node is looked up when it is used, in the base's newest version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..errors import BadArgument, DeferredError, InterposeError, NotReached, NotSaved
from ..graph.model import Key, Point
from ..graph.values import Ref
from .outside import is_deferred

if TYPE_CHECKING:
    from .recorder import Recorder

View: TypeAlias = tuple[Any, ...]
"""A view op and its further arguments: ("getitem", 0)."""


class Base(Protocol):
    """What a deferred value is a view of."""

    def node(self) -> int:
        """The node of its newest version."""

    def write(self, chain: tuple[View, ...], index: Any, value: Any) -> None:
        """Make a new version in which a part is changed."""


@dataclass(eq=False)
class Track:
    """The versions of one hook point in one run.

    Attributes:
        writes: how many there were, by the invoke that wrote.
        bases: who looks at it.
        reads: (invoke, path, version, body) -> the node that reads it.
    """

    writes: Counter[int | None] = field(default_factory=Counter)
    bases: list[PointBase] = field(default_factory=list)
    reads: dict[tuple[int | None, tuple[Key, ...], int, int | None], int] = field(default_factory=dict)

    def version(self, invoke: int | None) -> int:
        """How many writes an invoke sees."""
        if not self.writes:
            return 0
        return self.writes.total() if invoke is None else self.writes[None] + self.writes[invoke]


@dataclass(eq=False)
class PointBase:
    """A hook point as one invoke sees it, until it is replaced as a whole."""

    recorder: Recorder
    run: int
    invoke: int | None
    point: Point
    track: Track
    pinned: int | None = None
    """The last node before the whole was replaced: old names keep the old value."""
    views: tuple[View, ...] = ()
    """Of a named point: what leads from here to the value of that name."""
    when: int | None = None
    """The control node in whose body it was named."""

    def node(self) -> int:
        return self.recorder.points.read(self) if self.pinned is None else self.pinned

    def write(self, chain: tuple[View, ...], index: Any, value: Any) -> None:
        if self.pinned is not None:
            raise BadArgument(f"{self.point} was replaced since this value was read; read it again to write it")
        self.recorder.points.write(self, chain, index, value)


@dataclass
class ValueBase:
    """A computed value."""

    recorder: Recorder
    current: int

    def node(self) -> int:
        return self.current

    def write(self, chain: tuple[View, ...], index: Any, value: Any) -> None:
        node = self.recorder.nodes[self.current]
        if node.op == "param":
            name = ".".join(filter(None, node.args))
            raise BadArgument(
                f"{name} is a parameter, which a block doesn't change; write what its module returns, or compute "
                "with a copy: .clone()"
            )
        self.recorder.check_repeats(node.when)
        args = (Ref(self.current), chain, index, value)
        self.current = self.recorder.node("update", args)


class Value(Protocol):
    """A deferred value, as far as the recorder knows it."""

    _recorder: Recorder
    _root: Base
    _chain: tuple[View, ...]
    _at: tuple[int, int]
    """The base's node it was looked up at, and its own node then."""


MakeValue: TypeAlias = Callable[["Recorder", Base, tuple[View, ...], int], Any]


def is_view(value: Any, of: Any, view: View) -> bool:
    """Whether `value` is that very view of another deferred value."""
    return is_deferred(value) and value._root is of._root and value._chain == (*of._chain, view)


def is_same(value: Any, other: Any) -> bool:
    """Whether two names stand for the same part of the same value."""
    return is_deferred(value) and value._root is other._root and value._chain == other._chain


def why(value: Any) -> InterposeError:
    """Why a deferred value can't be used here."""
    recorder = value._recorder
    if value._absent:
        return NotReached(value._absent)
    if recorder.open:
        return DeferredError("this value belongs to another open block; use one trace with several invokes")
    if any(value is kept for _, kept in recorder.saved):
        return DeferredError("this value is still to come: its job hasn't ended; wait with t.job.result()")
    return NotSaved("this value was not saved: add .save() in the block it comes from")
