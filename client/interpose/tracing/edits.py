"""Interventions that stay: recorded once, without a prompt, and put before everything a later block records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import Token
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import BadArgument, DeferredError
from ..graph.model import Node, Run
from ..graph.values import Ref, TensorSpec, substitute

if TYPE_CHECKING:
    from .recorder import Recorder
    from .tracer import Tracer


@dataclass(frozen=True)
class Edit:
    """A graph for the whole batch of any run, and what it attached."""

    nodes: tuple[Node, ...]
    specs: Mapping[str, TensorSpec]
    tensors: Mapping[str, Any]
    skipped: frozenset[str] = frozenset()
    """How the paths begin of what lies in modules it skips."""


class Editor:
    """A block that records an edit. It has no prompt, so shapes with rows or positions aren't known in it."""

    def __init__(self, edited: Any, recorder: Recorder) -> None:
        self.model = edited
        self.recorder = recorder
        self._token: Token[Tracer | None] | None = None

    def __enter__(self) -> Any:
        from .tracer import ACTIVE

        if ACTIVE.get() is not None:
            raise DeferredError("a block is open already")
        self.recorder.start_run()
        self._token = ACTIVE.set(self)  # type: ignore[arg-type]
        return self.model

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from .tracer import ACTIVE

        if self._token is not None:
            ACTIVE.reset(self._token)
        if error is not None:
            self.recorder.open = False
            return
        if self.recorder.saved:
            saved = self.recorder.nodes[self.recorder.saved[0][0]]
            error = BadArgument("an edit saves nothing: save in the traces of the edited model")
            raise error.at(saved.id, saved.op, saved.source)
        graph, tensors = self.recorder.finish()
        edit = Edit(
            graph.nodes,
            graph.attachments,
            {key: _kept(tensor) for key, tensor in tensors.items()},
            self.recorder.points.skipped,
        )
        self.model.__dict__["_edits"] = (*self.model._edits, edit)


def _kept(tensor: Any) -> Any:
    """A copy that its owner can't change any more, as the edit outlives its block."""
    return tensor.clone() if hasattr(tensor, "clone") else tensor.copy()


def placed(edits: Sequence[Edit], runs: Sequence[Run], nodes: Sequence[Node]) -> list[Node]:
    """The nodes with every edit before them, once a run, and at every step of a generation."""
    if not edits:
        return list(nodes)
    found: list[Node] = []
    for index, run in enumerate(runs):
        control = None
        if run.kind == "generate":
            control = len(found)
            found.append(Node(control, "steps", (0, None), run=index))
        for at, edit in enumerate(edits):
            found += _moved(edit.nodes, len(found), index, control, f"edit{at}-")
    return [*found, *_moved(nodes, len(found), None, None, "")]


def _moved(nodes: Sequence[Node], by: int, run: int | None, control: int | None, names: str) -> list[Node]:
    """Nodes with their ids moved; an edit's go to `run` and into `control`'s body."""

    def renumber(ref: int) -> Ref:
        return Ref(ref + by)

    moved = []
    for node in nodes:
        args = tuple(substitute(arg, renumber) for arg in node.args)
        if node.op == "attachment" and names:
            args = (names + node.args[0],)
        moved.append(
            replace(
                node,
                id=node.id + by,
                args=args,
                kwargs={name: substitute(arg, renumber) for name, arg in node.kwargs.items()},
                run=node.run if run is None else run,
                when=control if node.when is None else node.when + by,
            )
        )
    return moved


def attached(edits: Sequence[Edit]) -> tuple[dict[str, TensorSpec], dict[str, Any]]:
    """What all edits attach, under the names `placed` gives them."""
    specs: dict[str, TensorSpec] = {}
    tensors: dict[str, Any] = {}
    for at, edit in enumerate(edits):
        for key, spec in edit.specs.items():
            specs[f"edit{at}-{key}"], tensors[f"edit{at}-{key}"] = spec, edit.tensors[key]
    return specs, tensors
