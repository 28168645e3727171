"""Hook points as they are recorded: reads, writes and replacements, and the versions these make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BadArgument, UnknownPoint, WrongOrder
from ..graph.manifest import Leaf, walk
from ..graph.model import Point
from ..graph.values import Ref
from . import bodies
from .bases import PointBase, Track, View
from .nests import Nest
from .outside import is_deferred

if TYPE_CHECKING:
    from .recorder import Recorder


class Points:
    """The hook points of one recorded job."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._tracks: dict[tuple[int, tuple[str, str, int, int]], Track] = {}
        self._skipped: set[tuple[int, int, int | None, str]] = set()

    @property
    def skipped(self) -> frozenset[str]:
        """How the paths begin of what lies in skipped modules."""
        return frozenset(inside for *_, inside in self._skipped)

    def at(self, point: Point) -> Any:
        """What lies at a point, for the current invoke: a deferred tensor, or a nest of them."""
        recorder = self._recorder
        layout = walk(recorder.manifest.module(point.module).points.get(point.name), point.path)
        if not isinstance(layout, Leaf):
            return Nest(recorder, point, layout)
        base = self._base(point.at_step(recorder.step))
        node = base.node()
        base.track.bases.append(base)
        return recorder.make(recorder, base, (), node)

    def output_field(self, value: Any, name: str) -> Any:
        """A field of the model's output by name, or None if it has none of that name."""
        point = value._root.point
        layout = self._recorder.manifest.module(point.module).points[point.name]
        if point.path == (name,):
            return value
        if not isinstance(layout, dict) or name not in layout:
            return None
        if layout[name] is None:
            raise UnknownPoint(f"the model's output has no tensor in its field {name!r}")
        return self.at(Point(point.module, point.name, (name,), point.call, point.step))

    def read(self, base: PointBase) -> int:
        """The node that reads a point in its newest version."""
        nodes, here = self._recorder.nodes, self._recorder.when
        # A name from outside a body of steps stays the value it was there, whatever step the body runs at.
        when = here if bodies.steps(nodes, here) == bodies.steps(nodes, base.when) else base.when
        reads, version = base.track.reads, base.track.version(base.invoke)
        for scope in bodies.scopes(nodes, when):
            found = reads.get((base.invoke, base.point.path, version, scope))
            if found is not None:
                return found
        node = self._node("read", (), base, when=when)
        reads[base.invoke, base.point.path, version, when] = node
        return node

    def write(self, base: PointBase, chain: tuple[View, ...], index: Any, value: Any) -> None:
        """Record a write of what `chain` and `index` lead to."""
        self._recorder.check_repeats(base.when)
        self._node("write", (chain, index, value), base)
        base.track.writes[base.invoke] += 1
        if self._recorder.in_steps():
            for (run, place), track in self._tracks.items():
                if run == base.run and place[:3] == base.point.place[:3] and track is not base.track:
                    track.writes[base.invoke] += 1

    def replace(self, point: Point, value: Any, views: tuple[View, ...] = ()) -> None:
        """Put another value at a point, or where views lead from it."""
        if self._is_whole(value, point, views):
            return  # the second half of `module.output += y`, which has been written already
        recorder = self._recorder
        point = point.at_step(recorder.step)
        given = recorder.arg(value)
        if not isinstance(given, Ref):
            raise BadArgument(
                f"{point} is replaced by a tensor, not by {type(value).__name__}; to fill it write [:] = ..."
            )
        base = self._base(point)
        track = base.track
        over = [old for old in track.bases if old.point == point and recorder.invoke in (None, old.invoke)]
        over = [old for old in over if not views or old.views == views]
        for old in over:
            old.pinned = old.node()
        track.bases = [old for old in track.bases if old.pinned is None]
        self.write(base, views, None, given)

    def put_back(self, value: Any, new: Any) -> None:
        """Replace the hook point that a value is all of."""
        self.replace(value._root.point, new)

    def skip(self, module: str, call: int, value: Any) -> None:
        """Check that `value` is there when a module begins; its inner points can't be asked for from now on."""
        recorder = self._recorder
        enters = recorder.manifest.moment(module, "inputs", call)
        ready = recorder.moment(recorder.arg(value))
        body = bodies.steps(recorder.nodes, recorder.when)
        step = recorder.step if body is None else recorder.nodes[body].args[0]
        if enters is not None and ready > (len(recorder.runs) - 1, step, enters):
            raise WrongOrder(f"{module} is skipped with a value that comes only after it has begun")
        self._skipped.add((len(recorder.runs) - 1, recorder.step, body, module + "."))

    def _base(self, point: Point) -> PointBase:
        recorder = self._recorder
        run = len(recorder.runs) - 1
        track = self._tracks.get((run, point.place))
        if track is None:
            track = self._tracks[run, point.place] = Track()
        return PointBase(recorder, run, recorder.invoke, point, track, when=recorder.when)

    def _is_whole(self, value: Any, point: Point, views: tuple[View, ...]) -> bool:
        """Whether `value` is all of what lies there for the current invoke, in its newest version."""
        if not is_deferred(value) or value._chain != views or not isinstance(value._root, PointBase):
            return False
        root, recorder = value._root, self._recorder
        here = root.recorder, root.point, root.invoke, root.run, root.pinned
        point = point.at_step(recorder.step)
        return here == (recorder, point, recorder.invoke, len(recorder.runs) - 1, None)

    def _node(self, op: str, args: Sequence[Any], base: PointBase, **rest: Any) -> int:
        recorder = self._recorder
        if base.run == len(recorder.runs) - 1 and recorder.stopped:
            raise WrongOrder(f"{base.point}: the forward was stopped before this line")
        here = base.run, base.point.step, bodies.steps(recorder.nodes, base.when)
        inside = [prefix for *where, prefix in self._skipped if tuple(where) == here]
        inside += [prefix for edit in recorder.edits for prefix in edit.skipped]
        if inside and base.point.module.startswith(tuple(inside)):
            raise WrongOrder(f"{base.point} lies in a module that this trace skips")
        return recorder.node(op, args, point=base.point, invoke=base.invoke, run=base.run, **rest)
