"""What an intervention is: hook points, nodes, invokes, runs, the graph.

Everything here is frozen data. `codec` gives the plain form, `validate` says whether a graph can run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from ..errors import Source
from .values import Arg, TensorSpec, refs

FORMAT = 2
"""Newest version of the graph's plain form: since 2 a run may choose an adapter."""

Key: TypeAlias = int | str
RunKind: TypeAlias = Literal["trace", "generate"]


@dataclass(frozen=True, slots=True)
class Point:
    """A place where a value can be read or replaced.

    Attributes:
        module: dotted path of the module, "" for the model itself.
        name: "output", "inputs" (a pair: positional, by keyword), or a named point such as "pattern".
        path: keys into the nested value found there, down to a tensor or a smaller nest.
        call: which call of that module within one forward, from 0.
        step: which forward of a generation, from 0.
    """

    module: str
    name: str
    path: tuple[Key, ...] = ()
    call: int = 0
    step: int = 0

    @property
    def place(self) -> tuple[str, str, int, int]:
        """The point without its path: what one hook serves."""
        return self.module, self.name, self.call, self.step

    def inner(self, *path: Key) -> Point:
        """What lies deeper in it."""
        return Point(self.module, self.name, (*self.path, *path), self.call, self.step)

    def at_step(self, step: int) -> Point:
        return self if step == self.step else replace(self, step=step)

    def __str__(self) -> str:
        keys = "".join(f"[{key!r}]" for key in self.path)
        extra = f" call {self.call}" if self.call else ""
        extra += f" step {self.step}" if self.step else ""
        return f"{self.module or 'model'}.{self.name}{keys}{extra}"


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    `op` is a key of the op table. `invoke` is the index of the invoke it belongs to within `run` (None: the
    whole batch of the run), `when` the control node whose body holds it (None: always). `refs` are the ids of all
    nodes its arguments refer to, in order, repeats included.
    """

    id: int
    op: str
    args: tuple[Arg, ...] = ()
    kwargs: Mapping[str, Arg] = field(default_factory=dict)
    point: Point | None = None
    invoke: int | None = None
    run: int = 0
    when: int | None = None
    source: Source | None = None
    refs: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = refs(self.args)
        if self.kwargs:
            found += refs([*self.kwargs.values()])
        object.__setattr__(self, "refs", tuple(found))


@dataclass(frozen=True, slots=True)
class Invoke:
    """One prompt, or list of prompts, or named tensors.

    Attributes:
        rows: token ids, one tuple a row, unpadded; empty tuples for a model that takes none.
        tensors: names of further model inputs -> SHA-256 of the attachment; first dimension: rows.
        text: the prompts as written, where there were any. For people; never run.
    """

    rows: tuple[tuple[int, ...], ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)
    text: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        return max(map(len, self.rows), default=0)


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of the model. Its invokes' rows form one batch, left-padded together.

    `adapter`: name of the weights that it runs with beside the model's own; None for these alone.
    """

    kind: RunKind = "trace"
    invokes: tuple[Invoke, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None

    @property
    def rows(self) -> int:
        return sum(len(invoke.rows) for invoke in self.invokes)

    @property
    def longest(self) -> int:
        return max((invoke.longest for invoke in self.invokes), default=0)

    @property
    def given(self) -> frozenset[str]:
        """Names of what is given beside token ids."""
        return frozenset(name for invoke in self.invokes for name in invoke.tensors)


@dataclass(frozen=True, slots=True)
class Graph:
    """Runs and their nodes in creation order. Node ids are their positions."""

    runs: tuple[Run, ...] = ()
    nodes: tuple[Node, ...] = ()
    attachments: Mapping[str, TensorSpec] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> Graph:
        """The graph with its attachments under other names."""
        nodes = tuple(
            replace(node, args=(names[node.args[0]],)) if node.op == "attachment" else node for node in self.nodes
        )
        runs = tuple(
            replace(run, invokes=tuple(_renamed(invoke, names) for invoke in run.invokes)) if run.given else run
            for run in self.runs
        )
        return Graph(runs, nodes, {names[key]: spec for key, spec in self.attachments.items()})

    @property
    def saves(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.op == "save")


def _renamed(invoke: Invoke, names: Mapping[str, str]) -> Invoke:
    return replace(invoke, tensors={name: names[key] for name, key in invoke.tensors.items()})
