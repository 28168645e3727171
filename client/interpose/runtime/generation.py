"""Generating tokens: a decode loop over the model's own forward and cache, every step open to interventions.

Where the model's cache keeps every position, jobs come and go between steps: new ones have their prompts run apart
and are put beside the others, those that are done make room.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..errors import JobCancelled
from . import caches
from .forward import Placed, place, starts
from .growing import Grower, Growing
from .inputs import FILL, positions
from .interpreter import Interpreter
from .loading import Loaded
from .pieces import Piece, joined
from .refusals import refusing
from .rows import Span
from .split.carrier import forward_of
from .tail import ARGUMENT, Tail

log = logging.getLogger(__name__)

Begun: TypeAlias = tuple[Interpreter, int, Sequence[Piece]]
"""A job, its run, and what that is given."""

_TEXT = frozenset({"attention_mask", "position_ids", "use_cache", "past_key_values"})
"""All that is kept from step to step where there is nothing but text."""


class Guests(Protocol):
    """Who comes and goes while a generation runs. Asked between its steps."""

    def pause(self, *, joinable: bool) -> None:
        """Time for others. `joinable`: whether any can join."""

    def arrivals(self) -> Sequence[Begun]:
        """Runs that join now."""

    def refused(self, begun: Sequence[Begun]) -> None:
        """Runs that came and can't run beside the others."""

    def ended(self, job: Interpreter) -> None:
        """A run is over while others go on."""


@dataclass
class Cohort:
    """Rows that share a cache, padded on the left to one width.

    Attributes:
        ids: [rows, width], the tokens chosen last included.
        state: what the model's own methods keep from step to step.
    """

    parts: list[Growing]
    ids: Tensor
    state: dict[str, Any]

    @property
    def rows(self) -> int:
        return len(self.ids)

    def place(self) -> None:
        """Say where each part's rows and images lie now."""
        rows = starts([len(part.rows) for part in self.parts])
        images = starts([sum(part.images) for part in self.parts])
        for part, row, image in zip(self.parts, rows, images, strict=True):
            part.first, part.image = row, image

    def leave(self) -> None:
        """Make room where parts are over, of rows and of positions that hold only padding."""
        staying = [part for part in self.parts if not part.over]
        rows = [part.first + index for part in staying for index in range(len(part.rows))]
        self.parts = staying
        if not rows:
            return
        index = torch.tensor(rows, device=self.ids.device)
        mask = self.state["attention_mask"][index]
        gone = int((mask.cumsum(-1) == 0).sum(-1).min())
        self.ids = self.ids[index, gone:]
        for name in ("attention_mask", "position_ids"):
            if name in self.state:
                self.state[name] = self.state[name][index, gone:]
        caches.keep(self.state["past_key_values"], rows, gone)
        self.place()

    def join(self, other: Cohort) -> None:
        """Take other rows beside these; the shorter ones are padded on the left."""
        width = max(self.ids.shape[1], other.ids.shape[1])

        def both(one: Tensor, more: Tensor) -> Tensor:
            # The mask and the positions are as wide as the cache, one less than the ids or as wide.
            to = width + one.shape[1] - self.ids.shape[1]
            return torch.cat([caches.padded(one, to, -1), caches.padded(more, to, -1)])

        for name in ("attention_mask", "position_ids"):
            if name in self.state:
                self.state[name] = both(self.state[name], other.state[name])
        caches.join(self.state["past_key_values"], other.state["past_key_values"])
        self.ids = both(self.ids, other.ids)
        self.parts += other.parts
        self.place()


class Generation:
    """Several runs that generate together.

    Args:
        tail: what of the model needn't see positions nobody looks at.
        guests: who comes and goes meanwhile.
    """

    def __init__(self, loaded: Loaded, tail: Tail | None, guests: Guests | None = None) -> None:
        self._loaded = loaded
        self._model: Any = loaded.model
        self._tail = tail
        self._guests = guests
        self._grower = Grower(loaded)

    def run(self, begun: Sequence[Begun]) -> None:
        """Generate until every run has ended, or nobody asks for more."""
        cohort = self._begin(begun)
        while cohort is not None and any(not part.over for part in cohort.parts):
            if self._flexible(cohort):
                if any(part.over for part in cohort.parts):
                    cohort.leave()
                self._admit(cohort)
            elif self._guests is not None:
                self._guests.pause(joinable=False)
            self._step(cohort)

    # -- who takes part ----------------------------------------------------------------------------------------

    def _begin(self, begun: Sequence[Begun]) -> Cohort | None:
        """Rows with their first token chosen; None if no job could begin."""
        parts = []
        for job, run, fed in begun:
            with job.guard():
                parts.append(self._grower.begin(job, run, fed))
            if job.error is not None:
                self._tell(job)
        if not parts:
            return None
        # Padded on the left alone: of all runs each ends at its last token.
        inputs = joined(
            [[piece for part in parts for piece in part.fed]], self._loaded.feeding.inputs, self._loaded.device
        )
        mask = inputs.attention_mask
        state: dict[str, Any] = {"attention_mask": mask, "use_cache": True, **inputs.tensors}
        if self._loaded.feeding.states(inputs.tensors):
            state["position_ids"] = positions(mask) + (self._loaded.feeding.offset or 0)
        elif inputs.tensors and "position_ids" in self._loaded.feeding.accepts:
            # Of a model that makes them of its images' sizes.
            with refusing():
                state["position_ids"] = self._model._prepare_position_ids_for_generation(inputs.input_ids, state)
        cohort = Cohort(parts, inputs.input_ids, state)
        cohort.place()
        self._step(cohort, first=True)
        return cohort

    def _flexible(self, cohort: Cohort) -> bool:
        """Whether rows can come and go."""
        state = cohort.state
        plain = state.keys() <= _TEXT and not self._loaded.feeding.images
        return plain and caches.flexible(state.get("past_key_values"))

    def _admit(self, cohort: Cohort) -> None:
        if self._guests is None:
            return
        self._guests.pause(joinable=True)
        arrived: Sequence[Begun] = ()
        try:
            arrived = self._guests.arrivals()
            other = self._begin(arrived) if arrived else None
        except Exception as error:  # noqa: BLE001 - whatever a model raises at their prompts; the others' steps are done
            log.warning("a prompt that came failed (%s); it runs apart", type(error).__name__)
            self._guests.refused(arrived)
            return
        if other is None:
            return
        if any(part.over for part in other.parts):
            other.leave()
        if other.parts:
            cohort.join(other)

    def _tell(self, job: Interpreter) -> None:
        if self._guests is not None:
            self._guests.ended(job)

    # -- steps -------------------------------------------------------------------------------------------------

    def _step(self, cohort: Cohort, *, first: bool = False) -> None:
        with refusing():
            inputs = self._model.prepare_inputs_for_generation(
                cohort.ids, next_sequence_length=None if first else 1, is_first_iteration=first, **cohort.state
            )
        width = cohort.ids.shape[1]
        placed = [self._placed(part, cohort, first) for part in cohort.parts if not part.over]
        images = sum(sum(part.images) for part in cohort.parts) if first else 0
        whole = Span.whole(cohort.rows, width if first else 1, width, images)
        forward = forward_of(self._loaded)(self._loaded, placed, whole, complete=True)
        with refusing(lambda: forward.serving):
            output = forward.run({**inputs, **self._kept(placed), "return_dict": True})
        forward.finish()
        cohort.state = self._model._update_model_kwargs_for_generation(output, cohort.state)
        cohort.ids = torch.cat([cohort.ids, self._choose(cohort, output.logits[:, -1])], dim=1)

    def _kept(self, placed: Sequence[Placed]) -> dict[str, Any]:
        """As the library's own `generate`, only the last position's logits, unless somebody looks at others."""
        if self._tail is None:
            return {}
        places = (place for part in placed for place in part.job.plan.at(part.run, part.step))
        return {} if any(map(self._tail.touches, places)) else {ARGUMENT: 1}

    def _placed(self, part: Growing, cohort: Cohort, first: bool) -> Placed:
        placed = place(part.job, part.run, part.span(cohort.ids.shape[1]), part.steps, part.images)
        if first:
            placed.give_mask(cohort.state["attention_mask"])
        with part.job.guard():
            if part.job.sink.cancelled():
                raise JobCancelled("cancelled while running")
        part.job.begin_step(part.run, part.steps, [row.ended for row in part.rows])
        return placed

    def _choose(self, cohort: Cohort, logits: Tensor) -> Tensor:
        """The next token of every row, [rows, 1]; rows that have ended get padding."""
        chosen = torch.full((cohort.rows, 1), FILL, dtype=torch.int64, device=self._loaded.device)
        for part in cohort.parts:
            if part.over:
                continue
            with part.job.guard():
                new = (
                    part.choose(logits[part.first : part.first + len(part.rows)]) if part.job.error is None else ()
                )
                for index, token in enumerate(new, part.first):
                    chosen[index] = FILL if token is None else token  # a pad may be any number the user gave
            part.stepped()
            if part.over:
                self._tell(part.job)
        return chosen
