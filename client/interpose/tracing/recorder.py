"""From what happens inside a block to a graph: nodes as they come, checked as they come.

What a name in the user's code stands for may change under it: a write to a hook point is seen by every view of that
point, as it would be with real tensors. So a deferred value holds no node but a base (a hook point, or a computed
value) and the views that lead from there; its node is looked up when it is used, in the base's newest version.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..errors import BadArgument, DeferredError, InterposeError, NotReached, NotSaved, UnknownPoint, WrongOrder
from ..graph import ops
from ..graph.generation import check_options
from ..graph.manifest import Leaf, Manifest, walk
from ..graph.model import Graph, Invoke, Node, Point, Run, RunKind
from ..graph.ops.convert import NAMED
from ..graph.ops.declare import MANY
from ..graph.ops.dtypes import category
from ..graph.trim import trimmed
from ..graph.validate import Checker
from ..graph.values import DType, Ref, TensorSpec
from .edits import Edit, attached, placed
from .gradients import GradientBase
from .keeping import StepValues
from .nests import Nest, Several
from .outside import counts_writes, dtype_of, is_deferred, snapshot, spec_of, version_of
from .source import caller

CONVERSIONS = frozenset({"to", "type", "type_as", *NAMED})
"""Views that are none where they change the dtype."""

View: TypeAlias = tuple[Any, ...]
"""A view op and its further arguments: ("getitem", 0)."""


class Base(Protocol):
    """What a deferred value is a view of."""

    def node(self) -> int:
        """The node of its newest version."""

    def write(self, chain: tuple[View, ...], index: Any, value: Any) -> None:
        """Make a new version in which a part is changed."""


@dataclass
class Track:
    """The versions of one hook point in one run: how many writes so far, and who looks at it."""

    writes: Counter[int | None] = field(default_factory=Counter)
    """By the invoke that wrote."""
    bases: list[PointBase] = field(default_factory=list)

    def version(self, invoke: int | None) -> int:
        """How many writes an invoke sees."""
        return self.writes.total() if invoke is None else self.writes[None] + self.writes[invoke]


@dataclass
class PointBase:
    """A hook point as one invoke sees it, until it is replaced as a whole."""

    recorder: Recorder
    run: int
    invoke: int | None
    point: Point
    pinned: int | None = None
    """The last node before the whole was replaced: old names keep the old value."""
    views: tuple[View, ...] = ()
    """Of a named point: what leads from here to the value of that name."""
    when: int | None = None
    """The control node in whose body it was named."""

    def node(self) -> int:
        return self.recorder.read(self) if self.pinned is None else self.pinned

    def write(self, chain: tuple[View, ...], index: Any, value: Any) -> None:
        if self.pinned is not None:
            raise BadArgument(f"{self.point} was replaced since this value was read; read it again to write it")
        self.recorder.write(self, chain, index, value)


@dataclass
class ValueBase:
    """A computed value."""

    recorder: Recorder
    current: int

    def node(self) -> int:
        return self.current

    def write(self, chain: tuple[View, ...], index: Any, value: Any) -> None:
        self.recorder.check_repeats(self.recorder.made_in(self.current))
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


class Recorder:
    """Records the graph of one job.

    Args:
        manifest: of the model it will run on.
        make: makes the deferred value of a node; the torch or the array face.
        edits: interventions that come before all others, in every run.
        symbolic: numbers of rows and positions aren't known.

    Attributes:
        invoke, step, when: of the nodes that come next.
        backward: the backward node whose gradients `.grad` names.
        stopped: nothing later in the current run may be asked for.
        standard: bases of named points that are computed, by run, invoke, step and name.
        parameters: names of values that may change when the graph runs again -> keys of their attachments.
        names: save nodes -> the names they were given.
    """

    def __init__(
        self, manifest: Manifest, make: MakeValue, edits: Sequence[Edit] = (), *, symbolic: bool = False
    ) -> None:
        self.manifest = manifest
        self.runs: list[Run] = []
        self.invoke: int | None = None
        self.step = 0
        self.when: int | None = None
        self.backward: int | None = None
        self.stopped = False
        self.saved: list[tuple[int, Any]] = []
        self.gradients: list[tuple[int, Any]] = []
        self.open = True
        self.edits = edits
        self._retained: list[Any] = []
        self._skipped: set[tuple[int, int, int | None, str]] = set()
        self._gradient_bases: dict[tuple[int, int], GradientBase] = {}
        self.standard: dict[Any, Any] = {}
        self.parameters: dict[str, str] = {}
        self.names: dict[int, str] = {}
        self._make = make
        self._nodes: list[Node] = []
        self._specs: dict[str, TensorSpec] = {}
        self._tensors: dict[str, Any] = {}
        self._attached: dict[int, tuple[Any, int, int]] = {}
        self._tracks: dict[tuple[int, tuple[str, str, int, int]], Track] = {}
        self._reads: dict[tuple[int, int | None, Point, int, int | None], int] = {}
        self._checker = Checker(manifest, self.runs, self._specs, symbolic=symbolic)

    # -- runs and invokes --------------------------------------------------------------------------------------

    def start_run(self, kind: RunKind = "trace") -> None:
        self.runs.append(Run(kind))
        self.invoke, self.step, self.stopped = None, 0, False

    def generate(self, options: Mapping[str, Any]) -> None:
        """Make the current run a generation."""
        check_options(options)
        given = {name: value for name, value in options.items() if value is not None}
        self.runs[-1] = replace(self.runs[-1], kind="generate", options=given)

    def add_invoke(self, invoke: Invoke) -> int:
        """Add an invoke to the current run; returns its index."""
        run = self.runs[-1]
        self.runs[-1] = replace(run, invokes=(*run.invokes, invoke))
        return len(run.invokes)

    # -- nodes -------------------------------------------------------------------------------------------------

    def node(self, op: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **rest: Any) -> int:
        """Record one node, checked. `rest`: point, invoke. Returns its id."""
        if not self.open:
            raise NotSaved("this value was not saved: add .save() inside the block to keep it")
        rest = {"invoke": self.invoke, "when": self.when, "run": max(len(self.runs) - 1, 0), **rest}
        node = Node(len(self._nodes), op, tuple(args), kwargs or {}, source=caller(), **rest)
        self._checker.add(node)
        self._nodes.append(node)
        return node.id

    def spec(self, node: int) -> Any:
        return self._checker.spec(node)

    def value(self, node: int) -> Any:
        """The deferred value of a node: one tensor, or a named or plain tuple of them."""
        base = ValueBase(self, node)
        return self._make(self, base, (), node)

    def op(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record an operation on values as the user wrote them; returns its deferred result."""
        op = ops.lookup(name)
        plain = [self.arg(arg) for arg in args]
        named = {key: self.arg(arg) for key, arg in kwargs.items()}
        first = args[0] if args else None
        if op.view and is_deferred(first):
            bound = tuple(ops.bind(op, plain, named).values())
            view = (op.name, *bound[1:])
            node = self.node(op.name, (plain[0], *bound[1:]))
            return self._view(first, view, node) if self._shares(plain[0], view, node) else self.value(node)
        return self._results(self.node(op.name, plain, named), op, plain, named)

    _interpose_record = op
    """What the `interpose.torch` namespace calls."""

    def _shares(self, source: Ref, view: View, node: int) -> bool:
        """Whether what a view op gives here is the same memory, so that a write to either is seen by both."""
        name, *args = view
        if name == "getitem":
            return not any(self._picks(item) for item in args[0])
        copies = name == "to" and args[2]
        return name not in CONVERSIONS or (self.spec(source.id) == self.spec(node) and not copies)

    def _picks(self, item: Any) -> bool:
        """Whether an index item copies what it selects: masks, lists, tensors but for single integers."""
        if not isinstance(item, Ref):
            return isinstance(item, list)
        spec = self.spec(item.id)
        return not isinstance(spec, TensorSpec) or bool(spec.shape) or spec.dtype == "bool"

    def _view(self, value: Any, view: View, node: int) -> Any:
        chain = (*value._chain, view)
        spec = self.spec(node)
        if not isinstance(spec, tuple):
            return self._make(self, value._root, chain, node)
        parts = []
        for index in range(len(spec)):
            part = self.node("getitem", (Ref(node), index))
            parts.append(self._make(self, value._root, (*chain, ("getitem", index)), part))
        return Several(parts)

    def _results(self, node: int, op: ops.Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        spec = self.spec(node)
        names = ops.outputs_of(op, args, kwargs)
        if names is None:
            return self.value(node)
        count = len(spec) if isinstance(spec, tuple) else len(names)
        parts = [self.value(self.node("getitem", (Ref(node), index))) for index in range(count)]
        return Several(parts, names if names != MANY else ())

    def ref(self, value: Value) -> int:
        """The node of a deferred value in its newest version."""
        if value._recorder is not self or not self.open:
            raise why(value)
        newest = value._root.node()
        if value._at[0] != newest:
            node = newest
            for name, *args in value._chain:
                node = self.node(name, (Ref(node), *args))
            if self._nodes[newest].when != self.when:
                return node  # recorded in a body, where names from outside it are not to be changed
            value._at = newest, node
        return value._at[1]

    # -- hook points -------------------------------------------------------------------------------------------

    def at(self, point: Point) -> Any:
        """What lies at a point, for the current invoke: a deferred tensor, or a nest of them."""
        layout = walk(self.manifest.module(point.module).points.get(point.name), point.path)
        if not isinstance(layout, Leaf):
            return Nest(self, point, layout)
        point = replace(point, step=self.step)
        base = PointBase(self, len(self.runs) - 1, self.invoke, point, when=self.when)
        node = base.node()
        self._track(base).bases.append(base)
        return self._make(self, base, (), node)

    def read(self, base: PointBase) -> int:
        # A name from outside a body of steps stays the value it was there, whatever step the body runs at.
        when = self.when if self._steps(self.when) == self._steps(base.when) else base.when
        about = base.run, base.invoke, base.point, self._track(base).version(base.invoke)
        for scope in self._scopes(when):
            if (*about, scope) in self._reads:
                return self._reads[*about, scope]
        self._reads[*about, when] = self._point_node("read", (), base, when=when)
        return self._reads[*about, when]

    def _scopes(self, control: int | None) -> Iterator[int | None]:
        """The bodies around a place in the graph whose reads are its own too, innermost first."""
        yield control
        while control is not None and self._nodes[control].op != "steps":
            control = self._nodes[control].when
            yield control

    def write(self, base: PointBase, chain: tuple[View, ...], index: Any, value: Any) -> None:
        self.check_repeats(base.when)
        self._point_node("write", (chain, index, value), base)
        self._track(base).writes[base.invoke] += 1
        if self.in_steps():
            for (run, place), track in self._tracks.items():
                if run == base.run and place[:3] == base.point.place[:3] and track is not self._track(base):
                    track.writes[base.invoke] += 1

    def made_in(self, node: int) -> int | None:
        """The control node in whose body a node lies."""
        return self._nodes[node].when

    def check_repeats(self, made: int | None) -> None:
        """Raises BadArgument if a body that runs many times is to change what was made outside it, under `made`.

        Each time it would begin with the same value: nothing would add up.
        """
        around = set(self._controls(made))
        for control in self._controls(self.when):
            if control not in around and self._nodes[control].op in ("steps", "loop"):
                raise BadArgument(
                    "what was made outside a body that runs many times can't be changed in place in it; read the "
                    "point there, or for values that add up use t.loop(n, body, start)"
                )

    def _controls(self, control: int | None) -> Iterator[int]:
        while control is not None:
            yield control
            control = self._nodes[control].when

    def replace(self, point: Point, value: Any, views: tuple[View, ...] = ()) -> None:
        """Put another value at a point, or where views lead from it."""
        if self._is_whole(value, point, views):
            return  # the second half of `module.output += y`, which has been written already
        point = replace(point, step=self.step)
        given = self.arg(value)
        if not isinstance(given, Ref):
            raise BadArgument(
                f"{point} is replaced by a tensor, not by {type(value).__name__}; to fill it write [:] = ..."
            )
        base = PointBase(self, len(self.runs) - 1, self.invoke, point, when=self.when)
        track = self._track(base)
        over = [old for old in track.bases if old.point == point and self.invoke in (None, old.invoke)]
        over = [old for old in over if not views or old.views == views]
        for old in over:
            old.pinned = old.node()
        track.bases = [old for old in track.bases if old.pinned is None]
        self.write(base, views, None, given)

    def skip(self, module: str, call: int, value: Any) -> None:
        """Check that `value` is there when a module begins; its inner points can't be asked for from now on."""
        enters = self.manifest.moment(module, "inputs", call)
        ready = self._checker.moment(self.arg(value))
        body = self._steps(self.when)
        step = self.step if body is None else self._nodes[body].args[0]
        if enters is not None and ready > (len(self.runs) - 1, step, enters):
            raise WrongOrder(f"{module} is skipped with a value that comes only after it has begun")
        self._skipped.add((len(self.runs) - 1, self.step, body, module + "."))

    @property
    def skipped(self) -> frozenset[str]:
        """How the paths begin of what lies in skipped modules."""
        return frozenset(inside for *_, inside in self._skipped)

    def _is_whole(self, value: Any, point: Point, views: tuple[View, ...]) -> bool:
        """Whether `value` is all of what lies there for the current invoke, in its newest version."""
        if not is_deferred(value) or value._chain != views or not isinstance(value._root, PointBase):
            return False
        root = value._root
        here = root.recorder, root.point, root.invoke, root.run, root.pinned
        return here == (self, replace(point, step=self.step), self.invoke, len(self.runs) - 1, None)

    def _point_node(self, op: str, args: Sequence[Any], base: PointBase, **rest: Any) -> int:
        if base.run == len(self.runs) - 1 and self.stopped:
            raise WrongOrder(f"{base.point}: the forward was stopped before this line")
        here = base.run, base.point.step, self._steps(base.when)
        inside = {prefix for *where, prefix in self._skipped if tuple(where) == here}
        if base.point.module.startswith((*inside, *(prefix for edit in self.edits for prefix in edit.skipped))):
            raise WrongOrder(f"{base.point} lies in a module that this trace skips")
        return self.node(op, args, point=base.point, invoke=base.invoke, run=base.run, **rest)

    def _track(self, base: PointBase) -> Track:
        return self._tracks.setdefault((base.run, base.point.place), Track())

    def again(self, value: Any) -> Any:
        """Another name for a value, without the rule of its role."""
        return self._make(self, value._root, value._chain, self.ref(value))

    def put_back(self, value: Any, new: Any) -> None:
        """Replace the hook point that a value is all of."""
        self.replace(value._root.point, new)

    def is_view(self, value: Any, of: Any, view: View) -> bool:
        """Whether `value` is that very view of another deferred value."""
        return is_deferred(value) and value._root is of._root and value._chain == (*of._chain, view)

    def is_same(self, value: Any, other: Any) -> bool:
        """Whether two names stand for the same part of the same value."""
        return is_deferred(value) and value._root is other._root and value._chain == other._chain

    def kind_of(self, value: Value) -> Any:
        """0 bool, 1 integer, 2 floating, 3 complex; None where the dtype isn't known."""
        spec = self.spec(self.ref(value))
        return category(spec.dtype) if isinstance(spec, TensorSpec) else None

    def is_dtype(self, value: Any) -> bool:
        return isinstance(value, DType) or dtype_of(value) is not None

    def output_field(self, value: Any, name: str) -> Any:
        """A field of the model's output by name, or None if it has none of that name."""
        point = value._root.point
        layout = self.manifest.module(point.module).points[point.name]
        if point.path == (name,):
            return value
        if not isinstance(layout, dict) or name not in layout:
            return None
        if layout[name] is None:
            raise UnknownPoint(f"the model's output has no tensor in its field {name!r}")
        return self.at(replace(point, path=(name,)))

    # -- saving ------------------------------------------------------------------------------------------------

    def save(self, value: Value) -> Any:
        """Keep a value: it becomes real after the block.

        Returns what becomes real: the value itself, another name for it where that was saved before, or in a body
        of steps a list with one value a step.
        """
        ref = self.ref(value)
        kept: Any = value
        if self.in_steps():
            kept = StepValues()
        elif any(value is other for _, other in self.saved):
            kept = self.again(value)
        self.saved.append((self.node("save", (Ref(ref),)), kept))
        return kept

    def keep_tokens(self) -> None:
        """Save a generation's token ids for nobody: it runs to its end even if all that is wanted is to watch."""
        ids = self.node("tokens", invoke=None, when=None)
        self.node("save", (Ref(ids),), invoke=None, when=None)

    def in_steps(self) -> bool:
        """Whether what comes next runs once a step."""
        return self._steps(self.when) is not None

    def _steps(self, control: int | None) -> int | None:
        """The body of steps that a control node is or lies in."""
        *_, outermost = self._scopes(control)
        return outermost

    def finish(self) -> tuple[Graph, dict[str, Any]]:
        """The graph without nodes nobody needs, and its attachments by provisional key.

        Raises BadArgument if a tensor from outside was changed after the line that used it.
        """
        self.open = False
        graph, tensors, ids = self.so_far()
        self.saved = [(ids[node], value) for node, value in self.saved]
        self.gradients = [(ids[node], value) for node, value in self.gradients]
        return graph, tensors

    def so_far(self) -> tuple[Graph, dict[str, Any], dict[int, int]]:
        """What `finish` gives, of all that is recorded by now, and the place in it of each node recorded."""
        for tensor, version, _ in self._attached.values():
            if version_of(tensor) != version:
                raise BadArgument("a tensor from outside was changed in the block after it was used; use a clone")
        specs, tensors = attached(self.edits)
        specs |= self._specs
        tensors |= self._tensors
        before = placed(self.edits, self.runs, self._nodes)
        nodes, renumbered = trimmed(before)
        moved = len(before) - len(self._nodes)
        ids = {old - moved: new for old, new in renumbered.items() if old >= moved}
        used = {node.args[0] for node in nodes if node.op == "attachment"}
        graph = Graph(tuple(self.runs), nodes, {key: specs[key] for key in used})
        return graph, {key: tensors[key] for key in used}, ids

    # -- gradients ---------------------------------------------------------------------------------------------

    def retain(self, value: Value) -> None:
        """Ask for a value's gradient: after the block it is its `.grad`."""
        self.ref(value)
        self._retained.append(value)

    def start_backward(self, loss: Value) -> int:
        """Record a backward; the gradients retained so far are kept."""
        self.backward = self.node("backward", (Ref(self.ref(loss)),))
        for value in self._retained:
            gradient = self.gradient(value)
            self.gradients.append((self.node("save", (Ref(self.ref(gradient)),)), value))
        return self.backward

    def gradient(self, value: Value) -> Any:
        """The gradient of a value in the current backward, deferred."""
        if self.backward is None:
            raise BadArgument("gradients exist once a loss runs backward: with loss.backward(): h.grad")
        if getattr(value._root, "computed", False):
            raise BadArgument(
                "the model doesn't make this tensor itself, so no gradient comes to it; take that of a value it is "
                "computed from"
            )
        target = value._root.node()
        base = self._gradient_bases.setdefault((target, self.backward), GradientBase(self, target, self.backward))
        node = base.node()
        for name, *args in value._chain:
            node = self.node(name, (Ref(node), *args))
        return self._make(self, base, value._chain, node)

    # -- arguments ---------------------------------------------------------------------------------------------

    def arg(self, value: Any) -> Any:
        """An argument as the user wrote it, in the vocabulary of graphs. Tensors from outside are attached."""
        if value is None or value is ... or isinstance(value, (bool, str)):
            return value
        if is_deferred(value):
            return Ref(self.ref(value))
        if isinstance(value, (tuple, list)):
            items = [self.arg(item) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, slice):
            return slice(self.arg(value.start), self.arg(value.stop), self.arg(value.step))
        if type(value) is int or type(value) is float or isinstance(value, DType):
            return value
        if isinstance(value, (np.integer, np.floating, np.bool_)):
            return value.item()
        if isinstance(value, range):
            return list(value)
        dtype = dtype_of(value)
        if dtype is not None:
            return dtype
        if hasattr(value, "__array__") or hasattr(value, "__torch_function__"):
            return Ref(self._attach(value))
        if hasattr(value, "__index__"):
            return operator.index(value)
        raise BadArgument(
            f"a {type(value).__name__} can't go into a graph; tensors, arrays, numbers and slices can"
        )

    def parameter(self, name: str, tensor: Any) -> Any:
        """The deferred value of a tensor of its own, which a later run of the graph may replace."""
        if name in self.parameters:
            raise BadArgument(f"there is a parameter {name!r} already; use the value it gave")
        node = self._attach(tensor)
        self.parameters[name] = self._nodes[node].args[0]
        return self.value(node)

    def _attach(self, tensor: Any) -> int:
        known = self._attached.get(id(tensor))
        if known is None or not self._as_attached(tensor):
            # A provisional name: a digest is only worth its time where the tensor has to travel.
            key = f"{len(self._tensors):064x}"
            self._specs[key], self._tensors[key] = spec_of(tensor), snapshot(tensor)
            node = self.node("attachment", (key,), invoke=None, when=None)
            known = self._attached[id(tensor)] = tensor, version_of(tensor), node
        return known[2]

    def _as_attached(self, tensor: Any) -> bool:
        """Whether an array is still what it was when it was attached; most tensors count their writes instead."""
        if counts_writes(tensor):
            return True
        kept = self._tensors[self._nodes[self._attached[id(tensor)][2]].args[0]]
        if hasattr(tensor, "detach"):
            return bool(tensor.equal(kept))
        return bool(np.asarray(tensor).tobytes() == kept.tobytes())


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
