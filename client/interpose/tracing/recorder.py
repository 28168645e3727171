"""From what happens inside a block to a graph: nodes as they come, checked as they come.

What a name in the user's code stands for may change under it: a write to a hook point is seen by every view of that
point, as it would be with real tensors. So a deferred value holds no node but a base (a hook point, or a computed
value) and the views that lead from there; its node is looked up when it is used, in the base's newest version.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..errors import BadArgument, DeferredError, InterposeError, NotSaved, UnknownPoint
from ..graph import ops
from ..graph.manifest import Layout, Leaf, Manifest, walk
from ..graph.model import Graph, Invoke, Key, Node, Point, Run, RunKind
from ..graph.ops.convert import NAMED
from ..graph.ops.declare import MANY
from ..graph.trim import trimmed
from ..graph.validate import Checker
from ..graph.values import DTYPES, DType, Ref, TensorSpec
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

    version: int = 0
    bases: list[PointBase] = field(default_factory=list)


@dataclass
class PointBase:
    """A hook point as one invoke sees it, until it is replaced as a whole."""

    recorder: Recorder
    run: int
    invoke: int | None
    point: Point
    pinned: int | None = None
    """The last node before the whole was replaced: old names keep the old value."""

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
    """

    def __init__(self, manifest: Manifest, make: MakeValue) -> None:
        self.manifest = manifest
        self.runs: list[Run] = []
        self.invoke: int | None = None
        self.saved: list[tuple[int, Any]] = []
        self.open = True
        self._make = make
        self._nodes: list[Node] = []
        self._specs: dict[str, TensorSpec] = {}
        self._tensors: dict[str, Any] = {}
        self._attached: dict[int, tuple[Any, int, int]] = {}
        self._tracks: dict[tuple[int, tuple[str, str, int, int]], Track] = {}
        self._reads: dict[tuple[int, int | None, Point, int], int] = {}
        self._checker = Checker(manifest, self.runs, self._specs)

    # -- runs and invokes --------------------------------------------------------------------------------------

    def start_run(self, kind: RunKind = "trace") -> None:
        self.runs.append(Run(kind))

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
        rest.setdefault("invoke", self.invoke)
        node = Node(
            len(self._nodes), op, tuple(args), kwargs or {}, run=len(self.runs) - 1, source=caller(), **rest
        )
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
        if value._recorder is not self:
            raise foreign(value)
        newest = value._root.node()
        if value._at[0] != newest:
            node = newest
            for name, *args in value._chain:
                node = self.node(name, (Ref(node), *args))
            value._at = newest, node
        return value._at[1]

    # -- hook points -------------------------------------------------------------------------------------------

    def at(self, point: Point) -> Any:
        """What lies at a point, for the current invoke: a deferred tensor, or a nest of them."""
        layout = walk(self.manifest.module(point.module).points.get(point.name), point.path)
        if not isinstance(layout, Leaf):
            return Nest(self, point, layout)
        base = PointBase(self, len(self.runs) - 1, self.invoke, point)
        node = base.node()
        self._track(base).bases.append(base)
        return self._make(self, base, (), node)

    def read(self, base: PointBase) -> int:
        key = base.run, base.invoke, base.point, self._track(base).version
        if key not in self._reads:
            self._reads[key] = self._point_node("read", (), base)
        return self._reads[key]

    def write(self, base: PointBase, chain: tuple[View, ...], index: Any, value: Any) -> None:
        self._point_node("write", (chain, index, value), base)
        self._track(base).version += 1

    def replace(self, point: Point, value: Any) -> None:
        """Put another value at a point."""
        if self._is_whole(value, point):
            return  # the second half of `module.output += y`, which has been written already
        given = self.arg(value)
        if not isinstance(given, Ref):
            raise BadArgument(
                f"{point} is replaced by a tensor, not by {type(value).__name__}; to fill it write [:] = ..."
            )
        base = PointBase(self, len(self.runs) - 1, self.invoke, point)
        track = self._track(base)
        over = [old for old in track.bases if old.point == point and self.invoke in (None, old.invoke)]
        for old in over:
            old.pinned = old.node()
        track.bases = [old for old in track.bases if old.pinned is None]
        self.write(base, (), None, given)

    def _is_whole(self, value: Any, point: Point) -> bool:
        """Whether `value` is all of what lies at a point for the current invoke, in its newest version."""
        if not is_deferred(value) or value._chain or not isinstance(value._root, PointBase):
            return False
        root = value._root
        here = root.recorder, root.point, root.invoke, root.run, root.pinned
        return here == (self, point, self.invoke, len(self.runs) - 1, None)

    def _point_node(self, op: str, args: Sequence[Any], base: PointBase) -> int:
        return self.node(op, args, point=base.point, invoke=base.invoke)

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

        Returns what becomes real: the value itself, or another name for it where that was saved before.
        """
        ref = self.ref(value)
        if any(kept is value for _, kept in self.saved):
            value = self.again(value)
        self.saved.append((self.node("save", (Ref(ref),)), value))
        return value

    def finish(self) -> tuple[Graph, dict[str, Any]]:
        """The graph without nodes nobody needs, and its attachments by provisional key.

        Raises BadArgument if a tensor from outside was changed after the line that used it.
        """
        self.open = False
        for tensor, version, _ in self._attached.values():
            if _version(tensor) != version:
                raise BadArgument("a tensor from outside was changed in the block after it was used; use a clone")
        nodes, renumbered = trimmed(self._nodes)
        self.saved = [(renumbered[node], value) for node, value in self.saved]
        used = {node.args[0] for node in nodes if node.op == "attachment"}
        graph = Graph(tuple(self.runs), nodes, {key: self._specs[key] for key in used})
        return graph, {key: self._tensors[key] for key in used}

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
        if type(value) is int or type(value) is float or isinstance(value, (DType, EllipsisType)):
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

    def _attach(self, tensor: Any) -> int:
        known = self._attached.get(id(tensor))
        if known is None or not self._as_attached(tensor):
            # A provisional name: a digest is only worth its time where the tensor has to travel.
            key = f"{len(self._tensors):064x}"
            self._specs[key], self._tensors[key] = spec_of(tensor), snapshot(tensor)
            node = self.node("attachment", (key,), invoke=None)
            known = self._attached[id(tensor)] = tensor, _version(tensor), node
        return known[2]

    def _as_attached(self, tensor: Any) -> bool:
        """Whether an array is still what it was when it was attached; tensors count their writes instead."""
        if hasattr(tensor, "_version"):
            return True
        key = self._nodes[self._attached[id(tensor)][2]].args[0]
        return bool(np.asarray(tensor).tobytes() == self._tensors[key].tobytes())


class Several(tuple[Any, ...]):
    """Several deferred values that came out of one operation; named where torch names them."""

    _names: tuple[str, ...]

    def __new__(cls, parts: Sequence[Any], names: Sequence[str] = ()) -> Several:
        made = super().__new__(cls, parts)
        made._names = tuple(names)
        return made

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            return self[self._names.index(name)]
        raise AttributeError(name)

    def save(self) -> Several:
        return Several([part.save() for part in self], self._names)


class Nest:
    """What a module takes or returns where that is more than one tensor: a tuple or mapping of deferred values."""

    def __init__(self, recorder: Recorder, point: Point, layout: Layout) -> None:
        self._recorder, self._point, self._layout = recorder, point, layout
        self._saved: dict[Key, Any] = {}

    def __getitem__(self, key: Key) -> Any:
        if key in self._saved:
            return self._saved[key]
        if isinstance(self._layout, tuple) and isinstance(key, int) and key < 0:
            return self[key + len(self._layout)]
        part = self._part(key)
        if part is None:
            raise UnknownPoint(f"{self._point}[{key!r}] is no tensor: there is nothing to read")
        return self._recorder.at(replace(self._point, path=(*self._point.path, key)))

    def __setitem__(self, key: Key, value: Any) -> None:
        if isinstance(self._layout, tuple) and isinstance(key, int) and key < 0:
            key += len(self._layout)
        self._part(key)
        self._recorder.replace(replace(self._point, path=(*self._point.path, key)), value)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and isinstance(self._layout, dict) and name in self._layout:
            return self[name]
        raise AttributeError(f"{self!r} has no {name!r}")

    def __len__(self) -> int:
        return len(self._keys())

    def __iter__(self) -> Any:
        if isinstance(self._layout, dict):
            return iter(self._layout)
        return iter([self[key] for key in self._keys()])

    def keys(self) -> Sequence[Key]:
        return self._keys()

    def items(self) -> list[tuple[Key, Any]]:
        return [(key, self[key]) for key in self._keys()]

    def save(self) -> Nest:
        """Save every tensor in it."""
        for key in self._keys():
            if self._part(key) is not None:
                self._saved[key] = self[key].save()
        return self

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self._keys()))
        return f"<{self._point}: {type(self._layout).__name__} of {shown}>"

    def _keys(self) -> Sequence[Key]:
        if isinstance(self._layout, dict):
            return list(self._layout)
        return range(len(self._layout)) if isinstance(self._layout, tuple) else ()

    def _part(self, key: Key) -> Layout:
        try:
            return walk(self._layout, (key,))
        except KeyError:
            raise UnknownPoint(
                f"{self._point} has no {key!r}; it has {', '.join(map(repr, self._keys()))}"
            ) from None


def is_deferred(value: Any) -> bool:
    """Whether a value is still to come."""
    return getattr(type(value), "_interpose_deferred", False)


def foreign(value: Any) -> InterposeError:
    """Why a deferred value of another block can't be used here."""
    if value._recorder.open:
        return DeferredError("this value belongs to another open block; use one trace with several invokes")
    return NotSaved("this value was not saved: add .save() in the block it comes from")


def dtype_of(value: Any) -> DType | None:
    """A torch or NumPy dtype as the graph's."""
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        name = np.dtype(value).name
    else:
        name = str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else ""
    return DType(name) if name in DTYPES else None


def spec_of(tensor: Any) -> TensorSpec:
    """Shape and dtype of a real tensor or array. Raises BadArgument for dtypes without a wire meaning."""
    dtype = dtype_of(tensor.dtype) if hasattr(tensor, "dtype") else None
    if dtype is None:
        raise BadArgument(f"a {type(tensor).__name__} of {getattr(tensor, 'dtype', '?')} can't go into a graph")
    return TensorSpec(tuple(tensor.shape), dtype.name)


def snapshot(tensor: Any) -> Any:
    """The tensor as it is now, free of its autograd history; arrays, which don't count their writes, are copied."""
    return tensor.detach() if hasattr(tensor, "detach") else np.array(tensor)


def _version(tensor: Any) -> int:
    return getattr(tensor, "_version", 0)
