"""Whether a graph can run on a model, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import BadArgument, IndexOutOfRange, LimitExceeded
from . import (
    accesses,  # noqa: F401 - their ops take part in the check
    control,  # noqa: F401
    exchange,  # noqa: F401
    ops,
)
from .adapters import check_adapter
from .checker import HANDLERS, Checker, Known
from .footprint import Footprint
from .generation import check_options, new_tokens
from .inputs import alone, check_inputs, counted
from .limits import Limits
from .manifest import Manifest, leaves
from .model import Graph, Node, Run
from .values import TensorSpec

HEAVY_FLOPS = 10**12
"""A graph that computes more than this by itself shares no batch: its mates would wait, and be charged, for it."""

ALIASES = frozenset({"choose", "carry", "end_loop", "call"})
"""Ops beside views whose result may be the very memory of an argument."""


@dataclass(frozen=True, slots=True)
class Report:
    """A valid graph: what is known of each node, and the whole job's footprint."""

    known: tuple[Known, ...]
    footprint: Footprint


def validate(graph: Graph, manifest: Manifest, limits: Limits, *, batching: str = "auto") -> Report:
    """Check a whole graph.

    Raises:
        GraphError: it can't run on this model; names the node.
        LimitExceeded: it asks for more than `limits`, with both figures.
    """
    limits.check("nodes", len(graph.nodes))
    for run in graph.runs:
        check_run(run, manifest, graph.attachments)
        limits.check("new_tokens", new_tokens(run))
    # The model's cache holds new tokens just as it holds the prompt's.
    rows = [_rows(run, graph, manifest) for run in graph.runs]
    limits.check("rows", sum(rows))
    tokens = sum(n * _longest(run, manifest) for n, run in zip(rows, graph.runs, strict=True))
    limits.check("tokens", tokens)
    for spec in graph.attachments.values():
        limits.check("attachment_bytes", spec.nbytes)
    attached = sum(spec.nbytes for spec in graph.attachments.values())
    checker = Checker(manifest, graph.runs, graph.attachments)
    for node in graph.nodes:
        checker.add(node)
    known = tuple(checker.known)
    times = [_times(graph, checker.scope[node.id]) for node in graph.nodes]
    result = sum(known[node.id].bytes * times[node.id] for node in graph.saves)
    # Attachments are all there from the start, used or not.
    memory = max(_most_alive(graph, known), attached)
    flops = sum(item.flops * count for item, count in zip(known, times, strict=True))
    limits.check("result_bytes", result)
    limits.check("memory_bytes", memory)
    limits.check("flops", flops)
    kinds = {run.kind for run in graph.runs}
    return Report(
        known,
        Footprint(
            kind=kinds.pop() if len(kinds) == 1 else "mixed",
            runs=len(graph.runs),
            rows=max(rows, default=0),
            longest=max((_longest(run, manifest) for run in graph.runs), default=0),
            tokens=tokens,
            steps=sum(map(new_tokens, graph.runs)),
            attention=checker.attention,
            gradients=checker.gradients,
            exclusive=checker.exclusive
            or batching == "exclusive"
            or not manifest.row_independent
            or flops > HEAVY_FLOPS
            or any(alone(run, manifest.inputs) for run in graph.runs),
            result_bytes=result,
            memory_bytes=memory,
            flops=flops,
            adapters=tuple(dict.fromkeys(run.adapter or "" for run in graph.runs)),
        ),
    )


def check_run(run: Run, manifest: Manifest, attachments: Mapping[str, TensorSpec]) -> None:
    """Token ids against the vocabulary, lengths against the model's positions, options of a generation, inputs."""
    if run.kind == "generate":
        check_options(run.options)
    elif run.options:
        raise BadArgument("a trace has no options")
    check_adapter(run.adapter, manifest)
    if not run.rows:
        raise BadArgument("nothing to run: no prompt was given")
    for invoke in run.invokes:
        for row in invoke.rows:
            if not row and manifest.tokens:
                raise BadArgument("a prompt has no tokens")
            if row and not manifest.tokens:
                raise BadArgument(f"{manifest.model} takes no tokens; it takes {', '.join(manifest.inputs)}")
            if row and manifest.vocab is not None and max(row) >= manifest.vocab:
                raise IndexOutOfRange(f"token id {max(row)} is outside the vocabulary of {manifest.vocab}")
    asked = run.longest + new_tokens(run)
    if manifest.positions is not None and asked > manifest.positions:
        new = f" and {new_tokens(run)} new tokens" if new_tokens(run) else ""
        raise LimitExceeded(
            f"a prompt of {run.longest} tokens{new}, where {manifest.model} has {manifest.positions} positions",
            details={"limit": "positions", "asked": asked, "allowed": manifest.positions},
        )
    if manifest.even_rows and len({len(row) for invoke in run.invokes for row in invoke.rows}) > 1:
        raise BadArgument(f"prompts of different lengths can't share a run here: {manifest.even_rows}")
    check_inputs(run, manifest, attachments)


def _rows(run: Run, graph: Graph, manifest: Manifest) -> int:
    """Rows of a run, or images if it has more of these: each is as much work as a row of its own."""
    return max(run.rows, sum(counted(invoke, manifest.inputs, graph.attachments) for invoke in run.invokes))


def _longest(run: Run, manifest: Manifest) -> int:
    """Positions of a row, new tokens included; of a model that takes none, those it makes of an image."""
    made = (manifest.modules[blocks[0]].points.get("output") for blocks in _lists(manifest))
    sizes = [leaf.dims[1] for layout in made for leaf in leaves(layout)[:1] if len(leaf.dims) > 2]
    fixed = max((size for size in sizes if isinstance(size, int)), default=1) if manifest.inputs else 1
    return max(run.longest + new_tokens(run), fixed if any(i.tensors for i in run.invokes) else 1)


def _lists(manifest: Manifest) -> list[Sequence[str]]:
    return [blocks for blocks in (manifest.blocks, *manifest.towers.values()) if blocks]


def _times(graph: Graph, scope: Sequence[int]) -> int:
    """How often a node runs: once a step in a body of steps. Loops count their turns themselves."""
    if not scope or graph.nodes[scope[0]].op != "steps":
        return 1
    owner = graph.nodes[scope[0]]
    start, stop = owner.args
    steps = new_tokens(graph.runs[owner.run])
    turns: int = min(steps, steps if stop is None else stop) - start
    return max(turns, 0)


def _most_alive(graph: Graph, known: Sequence[Known]) -> int:
    """Bytes of the graph's own values at the worst moment: each lives from its making to its last use."""
    order = sorted(graph.nodes, key=lambda node: (known[node.id].moment, node.id))
    last: dict[int, int] = {}
    for position, node in enumerate(order):
        for ref in node.refs:
            last[ref] = position
    _outlive(order, last)
    dies: dict[int, int] = {}
    for ref, position in last.items():
        dies[position] = dies.get(position, 0) + known[ref].bytes
    alive = most = 0
    for position, node in enumerate(order):
        alive += known[node.id].bytes
        most = max(most, alive + known[node.id].peak)
        alive -= dies.get(position, 0)
        if node.id not in last and node.op != "save":
            alive -= known[node.id].bytes
    return most


def _outlive(order: Sequence[Node], last: dict[int, int]) -> None:
    """A view keeps the whole memory it looks into: what it was made from lives as long as it does."""
    for node in reversed(order):
        op = ops.OPS.get(node.op)
        if node.id in last and (node.op in ALIASES or (op is not None and op.view)):
            for ref in node.refs:
                last[ref] = max(last[ref], last[node.id])


__all__ = ["HANDLERS", "Checker", "Known", "Report", "check_run", "validate"]
