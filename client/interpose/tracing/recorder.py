"""From what happens inside a block to a graph: nodes as they come, checked as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BadArgument, NotSaved
from ..graph import ops
from ..graph.generation import check_options
from ..graph.inputs import check_inputs
from ..graph.manifest import Manifest
from ..graph.model import Graph, Invoke, Node, Run, RunKind
from ..graph.ops.declare import MANY
from ..graph.ops.dtypes import category
from ..graph.trim import trimmed
from ..graph.validate import Checker
from ..graph.values import Ref, TensorSpec
from . import bodies
from .attachments import Attachments
from .bases import MakeValue, Value, ValueBase, View, why
from .edits import Edit, attached, placed
from .gradients import Gradients
from .keeping import StepValues
from .nests import Several
from .outside import is_deferred
from .points import Points
from .prompts import Prompt
from .source import caller
from .views import again, shares


class Recorder:
    """Records the graph of one job.

    Args:
        manifest: of the model it will run on.
        make: makes the deferred value of a node; the torch or the array face.
        edits: interventions that come before all others, in every run.
        symbolic: numbers of rows and positions aren't known.

    Attributes:
        invoke, step, when: of the nodes that come next.
        stopped: nothing later in the current run may be asked for.
        ahead: (invoke, module) -> how many steps `module.next()` went on in the current run.
        saved: save nodes, and what becomes real when their values come.
        standard: bases of named points that are computed, by run, invoke, step and name.
        parameters: names of values that may change when the graph runs again -> keys of their attachments.
        names: save nodes -> the names they were given.
    """

    def __init__(
        self, manifest: Manifest, make: MakeValue, edits: Sequence[Edit] = (), *, symbolic: bool = False
    ) -> None:
        self.manifest = manifest
        self.make = make
        self.edits = edits
        self.runs: list[Run] = []
        self.nodes: list[Node] = []
        self.invoke: int | None = None
        self.step = 0
        self.when: int | None = None
        self.stopped = False
        self.ahead: Counter[tuple[int | None, str]] = Counter()
        self.saved: list[tuple[int, Any]] = []
        self._kept: set[int] = set()
        self.open = True
        self.standard: dict[Any, Any] = {}
        self.parameters: dict[str, str] = {}
        self.names: dict[int, str] = {}
        self.points = Points(self)
        self.attachments = Attachments(self)
        self.gradients = Gradients(self)
        self._checker = Checker(manifest, self.runs, self.attachments.specs, symbolic=symbolic)

    # -- runs and invokes --------------------------------------------------------------------------------------

    def start_run(self, kind: RunKind = "trace", adapter: str | None = None) -> None:
        self.runs.append(Run(kind, adapter=adapter))
        self.invoke, self.step, self.stopped = None, 0, False
        self.ahead.clear()

    def generate(self, options: Mapping[str, Any]) -> None:
        """Make the current run a generation."""
        check_options(options)
        given = {name: value for name, value in options.items() if value is not None}
        self.runs[-1] = replace(self.runs[-1], kind="generate", options=given)

    def add_invoke(self, invoke: Invoke) -> int:
        """Add an invoke to the current run; returns its index.

        Raises BadArgument: the whole batch was touched already, with the shape it had before this one.
        """
        run = self.runs[-1]
        if any(self._whole_batch(node) for node in reversed(self.nodes)):
            raise BadArgument("t.invoke() without a prompt sees the whole batch: put it after the last prompt")
        self.runs[-1] = replace(run, invokes=(*run.invokes, invoke))
        return len(run.invokes)

    def add_prompt(self, prompt: Prompt) -> int:
        """Add an invoke and its tensors; returns its index. Raises what is wrong with them."""
        names = {name: self.attachments.keep(tensor) for name, tensor in prompt.tensors.items()}
        invoke = replace(prompt.invoke, tensors=names)
        run = self.runs[-1]
        check_inputs(replace(run, invokes=(*run.invokes, invoke)), self.manifest, self.attachments.specs)
        return self.add_invoke(invoke)

    def in_steps(self) -> bool:
        """Whether what comes next runs once a step."""
        return bodies.steps(self.nodes, self.when) is not None

    def check_repeats(self, made: int | None) -> None:
        """Raises BadArgument if what was made under a control node would be changed here many times."""
        bodies.check_repeats(self.nodes, self.when, made)

    def _whole_batch(self, node: Node) -> bool:
        touches = node.op in ("read", "write", "attention_mask")
        return touches and node.run == len(self.runs) - 1 and node.invoke is None

    # -- nodes -------------------------------------------------------------------------------------------------

    def node(self, op: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **rest: Any) -> int:
        """Record one node, checked. `rest`: point, invoke, run, when. Returns its id."""
        if not self.open:
            raise NotSaved("this value was not saved: add .save() inside the block to keep it")
        node = Node(
            len(self.nodes),
            op,
            tuple(args),
            kwargs or {},
            rest.get("point"),
            rest.get("invoke", self.invoke),
            rest.get("run", max(len(self.runs) - 1, 0)),
            rest.get("when", self.when),
            caller(),
        )
        self._checker.add(node)
        self.nodes.append(node)
        return node.id

    def spec(self, node: int) -> Any:
        return self._checker.spec(node)

    def moment(self, values: object) -> tuple[int, int, int]:
        """When the last of some arguments exists: run, step, event within the forward."""
        return self._checker.moment(values)

    def arg(self, value: Any) -> Any:
        """An argument as the user wrote it, in the vocabulary of graphs. Tensors from outside are attached."""
        return self.attachments.plain(value)

    # -- values ------------------------------------------------------------------------------------------------

    def value(self, node: int) -> Any:
        """The deferred value of a node: one tensor, or a named or plain tuple of them."""
        return self.make(self, ValueBase(self, node), (), node)

    def op(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record an operation on values as the user wrote them; returns its deferred result."""
        op = ops.lookup(name)
        plain = [self.arg(arg) for arg in args]
        # The device that values show, `device=x.device`, says nothing: a graph runs where the model is.
        told = {key: arg for key, arg in kwargs.items() if key != "device" or str(arg) != "cpu"}
        named = {key: self.arg(arg) for key, arg in told.items()}
        first = args[0] if args else None
        if op.view and is_deferred(first):
            bound = tuple(ops.bind(op, plain, named).values())
            view = (op.name, *bound[1:])
            node = self.node(op.name, (plain[0], *bound[1:]))
            return self._view(first, view, node) if shares(self, plain[0], view, node) else self.value(node)
        return self._results(self.node(op.name, plain, named), op, plain, named)

    _interpose_record = op
    """What the `interpose.torch` namespace calls."""

    def _view(self, value: Any, view: View, node: int) -> Any:
        chain = (*value._chain, view)
        spec = self.spec(node)
        if not isinstance(spec, tuple):
            return self.make(self, value._root, chain, node)
        parts = []
        for index in range(len(spec)):
            part = self.node("getitem", (Ref(node), index))
            parts.append(self.make(self, value._root, (*chain, ("getitem", index)), part))
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
            for view in value._chain:
                node = again(self, node, view)
            if self.nodes[newest].when != self.when:
                return node  # recorded in a body, where names from outside it are not to be changed
            value._at = newest, node
        return value._at[1]

    def again(self, value: Any) -> Any:
        """Another name for a value, without the rule of its role."""
        return self.make(self, value._root, value._chain, self.ref(value))

    def kind_of(self, value: Value) -> Any:
        """0 bool, 1 integer, 2 floating, 3 complex; None where the dtype isn't known."""
        spec = self.spec(self.ref(value))
        return category(spec.dtype) if isinstance(spec, TensorSpec) else None

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
        elif id(value) in self._kept:
            kept = self.again(value)
        self.keep(ref, kept)
        return kept

    def keep(self, ref: int, kept: Any) -> None:
        """Save the value of a node: `kept` becomes it."""
        self.saved.append((self.node("save", (Ref(ref),)), kept))
        self._kept.add(id(kept))

    def keep_tokens(self) -> None:
        """Save a generation's token ids for nobody: it runs to its end even if all that is wanted is to watch."""
        ids = self.node("tokens", invoke=None, when=None)
        self.node("save", (Ref(ids),), invoke=None, when=None)

    def finish(self) -> tuple[Graph, dict[str, Any]]:
        """The graph without nodes nobody needs, and its attachments by provisional key.

        Raises BadArgument if a tensor from outside was changed after the line that used it.
        """
        self.open = False
        graph, tensors, ids = self.so_far()
        self.saved = [(ids[node], value) for node, value in self.saved]
        self.gradients.saved = [(ids[node], value) for node, value in self.gradients.saved]
        return graph, tensors

    def so_far(self) -> tuple[Graph, dict[str, Any], dict[int, int]]:
        """What `finish` gives, of all that is recorded by now, and the place in it of each node recorded."""
        self.attachments.check_unchanged()
        specs, tensors = attached(self.edits)
        specs |= self.attachments.specs
        tensors |= self.attachments.tensors
        before = placed(self.edits, self.runs, self.nodes)
        nodes, renumbered = trimmed(before)
        moved = len(before) - len(self.nodes)
        ids = {old - moved: new for old, new in renumbered.items() if old >= moved}
        used = {node.args[0] for node in nodes if node.op == "attachment"}
        used |= {key for run in self.runs for invoke in run.invokes for key in invoke.tensors.values()}
        graph = Graph(tuple(self.runs), nodes, {key: specs[key] for key in used})
        return graph, {key: tensors[key] for key in used}, ids
