"""Running the forwards that a group of runs takes, and keeping what one makes for those that come after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..graph.inputs import counted
from .forward import Placed, place, starts
from .inputs import ModelInputs
from .loading import Loaded
from .pieces import joined, pieces
from .plan import Place
from .prefix import Keeping, Parts, Past, Prefix, behind
from .refusals import refusing
from .restart import Made, Restart
from .rows import Span
from .split.carrier import forward_of
from .stages import ALL, Member, Rows, Stage
from .tail import Cut, Tail


class Staging:
    """What the forwards of one group have made for one another so far.

    Args:
        tail: what of the model needn't see positions nobody looks at.
    """

    def __init__(self, loaded: Loaded, tail: Tail | None, restart: Restart, prefix: Prefix) -> None:
        self._loaded = loaded
        self._inputs = loaded.manifest.inputs
        self._tail = tail
        self._restart = restart
        self._prefix = prefix
        self._made: dict[tuple[Rows, int], Made] = {}
        """By rows and block, what was made before that block for rows of later stages."""
        self._pasts: dict[Rows, Past] = {}
        """What rows made of first tokens for those that begin behind them."""

    def run(self, stage: Stage) -> None:
        """One forward: a stage, or a portion of it. Jobs that failed by now are left out."""
        seated = [rows for rows in stage.rows if not rows.over]
        if not seated:
            return
        inputs = self._joined(seated, stage.skip)
        spans = self._spans(seated, inputs, stage.skip)
        rows, width = inputs.attention_mask.shape
        whole = Span.whole(rows, width, width, sum(span.images for span in spans.values()))
        placed = [
            place(*seat.member, span, images=self._images(seat.member), since=seat.since, until=seat.until)
            for own, span in spans.items()
            for seat in own.seats
            if seat.until > seat.since
        ]
        for part in placed if not stage.block else ():
            part.give_mask(inputs.attention_mask)
        begun = self._begun(stage.block, spans, whole) if stage.block else None
        cut = self._cut(placed, inputs, stage.skip)
        kept = self._kept(spans)
        plain = any(rows.seats[0].member[0].exclusive for rows in seated)
        kwargs = self._kwargs(inputs, plain=plain)
        keeping = Keeping(self._prefix, spans, stage.keep) if stage.keep else None
        if keeping is not None:
            kept |= keeping.places
            kwargs |= keeping.arguments
        first: Mapping[Place, Parts] = {}
        if stage.skip:
            past, first = self._behind(stage.skip, spans, whole)
            kwargs |= past
        forward = forward_of(self._loaded)(
            self._loaded, placed, whole, cut=cut, kept=kept, begun=begun, first=first
        )
        with refusing(lambda: forward.serving):
            forward.run(kwargs | (cut.argument if cut else {}))
        forward.finish()
        if keeping is not None:
            self._pasts |= keeping.pasts()

    def over(self, stage: Stage) -> None:
        """All of a stage was run: let go of what was made for it."""
        self._made = {key: made for key, made in self._made.items() if key[1] != stage.block}
        if stage.skip:
            self._pasts.clear()  # those of other sizes come after it

    def _joined(self, seated: Sequence[Rows], skip: int) -> ModelInputs:
        """What the forward is given: [rows, positions], without the first `skip` tokens of each row."""
        fed = [pieces(own.run, own.seats[0].member[0].attachments) for own in seated]
        if not skip:
            return joined(fed, self._inputs, self._loaded.device)
        short = [[behind(piece, skip) for piece in own] for own in fed]
        return self._prefix.behind(joined(short, self._inputs, self._loaded.device), skip)

    def _spans(self, seated: Sequence[Rows], inputs: ModelInputs, skip: int) -> dict[Rows, Span]:
        """Where in the batch, tokens that aren't computed included, each lies."""
        images = [sum(self._images(own.seats[0].member)) for own in seated]
        firsts = zip(starts([own.run.rows for own in seated]), starts(images), strict=True)
        lengths = [skip + width for width in inputs.widths]
        return {
            own: Span(row, own.run.rows, 0, length, 0, length, image, count)
            for own, (row, image), length, count in zip(seated, firsts, lengths, images, strict=True)
        }

    def _images(self, member: Member) -> list[int]:
        """How many images each invoke of a run has; runs of the same rows may have other invokes."""
        job, run = member
        graph = job.plan.graph
        return [counted(invoke, self._inputs, graph.attachments) for invoke in graph.runs[run].invokes]

    def _begun(self, block: int, spans: Mapping[Rows, Span], whole: Span) -> AbstractContextManager[None]:
        """A context in which the forward begins at a block, from what earlier ones made before it."""
        origins = [self._made[own.origin, block] for own in spans if own.origin]
        layout = self._restart.layout(block)
        return self._restart.begun(block, Made.joined(origins, layout, [*spans.values()], whole))

    def _behind(
        self, size: int, spans: Mapping[Rows, Span], whole: Span
    ) -> tuple[dict[str, Any], Mapping[Place, Parts]]:
        """Arguments by which the forward begins behind first tokens, and what these made where runs look."""
        before = [self._pasts[own.origin] for own in spans if own.origin]
        begins = [replace(span, length=size) for span in spans.values()]
        return self._prefix.begin(before), self._prefix.first(before, begins, replace(whole, length=size))

    def _kept(self, spans: Mapping[Rows, Span]) -> dict[Place, Callable[[Any], None]]:
        """Where the forward is to keep what it makes for later stages."""

        def keep(block: int) -> Callable[[Any], None]:
            def seen(nest: Any) -> None:
                for rows, span in spans.items():
                    if block in rows.kept:
                        self._made[rows, block] = Made.of(nest, self._restart.layout(block), span)

            return seen

        blocks = frozenset[int]().union(*(rows.kept for rows in spans))
        return {self._restart.exit_of(block): keep(block) for block in blocks}

    def _cut(self, placed: Sequence[Placed], inputs: ModelInputs, before: int) -> Cut | None:
        """Drop the logits nobody looks at, in a forward that several runs share, or that begins behind tokens."""
        if (len(placed) == 1 and not before) or self._tail is None or any(part.job.exclusive for part in placed):
            return None
        if not self._restart.unaltered(self._loaded.modules[name] for name in self._tail.modules):
            return None  # someone's hook there may look at positions; nothing begins behind tokens then
        reads = [(part.job, self._tail.last_only(part.job.plan, part.run)) for part in placed if part.until == ALL]
        if any(nodes is None for _, nodes in reads) or not any(nodes for _, nodes in reads):
            return None
        for job, nodes in reads:
            job.narrowed |= nodes or frozenset()
        return Cut(self._tail, inputs.widths, before)

    def _kwargs(self, inputs: ModelInputs, *, plain: bool) -> dict[str, Any]:
        feeding = self._loaded.feeding
        kwargs: dict[str, Any] = feeding.kwargs(inputs)
        if plain or "use_cache" not in feeding.accepts:
            return kwargs
        # One forward reads no cache; without one its keys and values die with their layer. They also lie otherwise
        # in memory, which changes last bits.
        return kwargs | {"use_cache": False}
