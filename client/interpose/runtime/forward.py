"""One forward of the model, shared by the runs placed in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from ..errors import NotReached
from ..graph.functions import call_of, calls
from ..graph.manifest import EVENT, Manifest
from ..graph.model import Node
from .failures import unreached
from .hooks import hooked
from .interpreter import Interpreter
from .loading import Loaded
from .plan import Place
from .prefix import Extended, Parts, layout_of
from .products import Products
from .rows import Span
from .slots import Touched
from .tail import Cut


@dataclass(frozen=True)
class Placed:
    """One job's run within a forward: its part of the batch, and each invoke's part of that.

    Attributes:
        since, until: the moments of the forward between which it is served there; the others are another forward's.
    """

    job: Interpreter
    run: int
    span: Span
    invokes: tuple[Span, ...]
    step: int = 0
    since: float = -math.inf
    until: float = math.inf

    def places(self, manifest: Manifest) -> Mapping[Place, tuple[Node, ...]]:
        """What it reads and writes in this forward."""
        found = self.job.own.at(self.run, self.step)
        if (self.since, self.until) == (-math.inf, math.inf):
            return found
        return {place: nodes for place, nodes in found.items() if self._serves(manifest.moment(*place))}

    def _serves(self, moment: int | None) -> bool:
        assert moment is not None, "a run is divided by moments that are known"
        return self.since <= moment < self.until

    def cut(self, cut: Cut) -> tuple[Span, tuple[Span, ...]]:
        """Its part, and each invoke's of that, of what a cut leaves."""
        return cut.part(self.span), tuple(replace(invoke, start=0, length=1) for invoke in self.invokes)

    def give_mask(self, mask: torch.Tensor) -> None:
        """Provide the reads of the attention mask, [rows, positions] of the whole batch."""
        for node in self.job.own.nodes("attention_mask"):
            if node.run != self.run or self.job.error is not None:
                continue
            span = self.span if node.invoke is None else self.invokes[node.invoke].within(self.span)
            with self.job.guard():
                part = mask[span.row : span.row + span.rows, span.start : span.start + span.length]
                self.job.provide(node.id, part.contiguous())


def place(
    job: Interpreter,
    run: int,
    span: Span,
    step: int = 0,
    images: Sequence[int] = (),
    *,
    since: float = -math.inf,
    until: float = math.inf,
) -> Placed:
    """A run placed in a forward: invokes follow one another by rows and images, each ends where its run ends."""
    invokes = job.plan.graph.runs[run].invokes
    images = images or [0] * len(invokes)
    firsts = zip(starts([len(invoke.rows) for invoke in invokes]), starts(images), strict=True)
    parts = []
    for (row, image), invoke, count in zip(firsts, invokes, images, strict=True):
        keys = invoke.longest + step
        length = invoke.longest if not step else 1
        parts.append(
            Span(row, len(invoke.rows), span.length - length, length, span.keys - keys, keys, image, count)
        )
    return Placed(job, run, span, tuple(parts), step, since, until)


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each of several pieces laid end to end begins."""
    return [*accumulate(sizes, initial=0)][:-1]


class Enough(Exception):
    """Nobody needs what comes after this point of the forward."""


class Forward:
    """A `Visitor` of the model's hooks that serves every run placed in the batch.

    Args:
        whole: the batch.
        complete: run the model to its end even when nobody waits for a point any more.
        cut: where positions are dropped that nobody looks at.
        kept: place -> who is shown the value there that the model goes on with.
        begun: a context for the model's forward, entered with its hooks set.
        first: what was made at places of the positions before those that it computes; `whole` holds all of them.
    """

    def __init__(
        self,
        loaded: Loaded,
        placed: Sequence[Placed],
        whole: Span,
        *,
        complete: bool = False,
        cut: Cut | None = None,
        kept: Mapping[Place, Callable[[Any], None]] | None = None,
        begun: AbstractContextManager[None] | None = None,
        first: Mapping[Place, Parts] | None = None,
    ) -> None:
        self.loaded = loaded
        self.cut = cut
        self.kept = {**(kept or {})}
        self._first = first or {}
        self._begun = begun or nullcontext()
        self.whole = whole
        self.serving = False
        """Whether a hook's code runs, and not the model's; stays so once that raises."""
        self.complete = complete
        self.waiting: dict[Place, list[tuple[Placed, tuple[Node, ...]]]] = {at: [] for at in self.kept}
        for part in placed:
            if part.job.error is None:
                for at, nodes in part.places(loaded.manifest).items():
                    self.waiting.setdefault(at, []).append((part, nodes))
        self._at_functions: dict[str, list[tuple[Placed, Node]]] = {}
        for (module, event, _), parts in self.waiting.items():
            if call_of(event):
                touching = [(part, nodes[0]) for part, nodes in parts]
                self._at_functions.setdefault(module, []).extend(touching)
        self._placed = placed
        self._products = _products(placed)
        self.attention = any(part.job.plan.attention(part.run) for part in placed)
        self._writes_stream = any(
            node.op == "write"
            for (_, event, _), parts in self.waiting.items()
            for _, nodes in parts
            for node in nodes
            if event == EVENT["stream"]
        )

    def run(self, kwargs: Mapping[str, Any], args: Sequence[Any] = ()) -> Any:
        """The model's output; None if it was stopped early."""
        return self.serve(lambda: self.loaded.model(*args, **kwargs))

    def serve(self, call: Callable[[], Any]) -> Any:
        """What `call` returns, which runs the model or a part of it; None if it was stopped early."""
        if self.over:
            return None
        for part in self._placed:
            part.job.products = self._products
        touched = {name: self.loaded.modules[name] for name, _, _ in self.waiting}
        with hooked(touched, self.loaded.names, self, self._functions(), self._exits()), self._begun:
            try:
                return call()
            except Enough:
                return None

    @property
    def over(self) -> bool:
        """Whether nobody needs what comes."""
        return not (self.complete or self.kept) and all(
            part.job.error for entries in self.waiting.values() for part, _ in entries
        )

    def _exits(self) -> set[str]:
        """The modules that are asked for nothing but what they return, and aren't called within themselves."""
        modules = self.loaded.manifest.modules
        entered = {module for module, event, _ in self.waiting if event != EVENT["output"]}
        return {module for module, _, _ in self.waiting if not (module in entered or modules[module].reentered)}

    def _functions(self) -> dict[str, list[str]]:
        """The modules whose functions are touched, and what they call; none where a later step calls others."""
        at = {module for module, event, _ in self.waiting if call_of(event)}
        if any(part.step for parts in self.waiting.values() for part, _ in parts):
            at -= self.loaded.first_only
        return {module: calls(self.loaded.manifest.modules[module]) for module in at}

    def astray(self, module: str) -> None:
        for part, node in self._at_functions.get(module, ()):
            part.job.fail(
                NotReached(f"{module} called other functions in this forward than were measured").at(
                    node.id, node.op, node.source
                )
            )

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        self.serving = True
        if event == EVENT["inputs"]:
            value = self._serve(module, EVENT["stream"], call, value)
        value = self._serve(module, event, call, value)
        self.serving = False
        return value

    def _serve(self, module: str, event: str, call: int, value: Any) -> Any:
        parts = self.waiting.pop((module, event, call), None)
        if parts is None:
            return value
        layout = layout_of(self.loaded.manifest, (module, event, call))
        # What a function of the block's own makes may be the very memory that is written as its stream.
        rewritten = (module, event) in self.loaded.rewritten or (self._writes_stream and call_of(event) is not None)
        cut = self.cut if self.cut is not None and self.cut.tail.touches((module, event, call)) else None
        whole = self.whole if cut is None else cut.whole(self.whole)
        stream = event == EVENT["stream"]
        first = self._first.get((module, event, call))
        if first is None:
            touched = Touched(value, layout, whole, rewritten, in_place=stream)
        else:
            touched = Extended(value, layout, whole, in_place=stream, first=first)
        for part, nodes in parts:
            if part.job.error is None:
                span, invokes = (part.span, part.invokes) if cut is None else part.cut(cut)
                part.job.fire(nodes, touched, span, invokes)
                if self._products is not None:
                    self._products.relieve()
        shown = touched.result()
        keep = self.kept.pop((module, event, call), None)
        if keep is not None:
            keep(shown)
        if self.over:
            raise Enough
        return shown

    def finish(self) -> None:
        """The forward is over: run what waited for that; fail the jobs that wait for a point it never came to."""
        if self._products is not None:
            self._products.settle()
        for part in self._placed:
            part.job.products = None
        for entries in self.waiting.values():
            for part, nodes in entries:
                missed = [node for node in nodes if not part.job.skips(node)]
                if missed:
                    part.job.fail(unreached(missed[0]))


def _products(placed: Sequence[Placed]) -> Products | None:
    """For runs that share a forward, and want no gradients."""
    alone = len(placed) == 1 or any(part.job.exclusive or part.job.plan.backwards for part in placed)
    return None if alone else Products()
