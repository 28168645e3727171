"""Generating tokens: a decode loop over the model's own forward and cache, every step open to interventions.

What to do with the logits is the transformers library's: its processors, its defaults, its order. Each row has its
own processors and its own random generator, so what it gets doesn't depend on its neighbours.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import BadArgument, JobCancelled, OpFailed
from ..graph.generation import new_tokens
from .forward import Forward, Placed, place, starts
from .inputs import FILL, positions
from .interpreter import Interpreter
from .loading import Loaded
from .pieces import Piece, joined
from .rows import Span

_OURS = ("seed", "stop_strings", "stream")


@dataclass
class Row:
    """One text that grows. `ids` [1, length], without padding."""

    ids: Tensor
    processors: Any
    generator: torch.Generator | None
    ends: frozenset[int]
    sample: bool
    stops: tuple[str, ...]
    tokenizer: Tokenizer | None
    prompt: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        self.prompt = self.ids.shape[1]

    def choose(self, logits: Tensor) -> int:
        """The next token for logits [1, vocabulary]; the row has it from now on."""
        scores = self.processors(self.ids, logits.to(torch.float32, copy=True))
        if self.sample:
            chances = torch.softmax(scores, -1)
            # On a GPU the kernel that draws would end the process.
            if not bool(torch.isfinite(chances).all()):
                raise OpFailed("nothing can be drawn: the logits hold nan, or nothing but -inf")
            chosen = torch.multinomial(chances, 1, generator=self.generator)
        else:
            chosen = scores.argmax(-1, keepdim=True)
        self.ids = torch.cat([self.ids, chosen], dim=1)
        token = int(chosen.item())
        self.ended = token in self.ends or self._stopped()
        return token

    def _stopped(self) -> bool:
        if not self.stops or self.tokenizer is None:
            return False
        text = self.tokenizer.decode(self.ids[0, self.prompt :].tolist(), skip_special_tokens=False)
        return any(stop in text for stop in self.stops)


@dataclass
class Growing:
    """One job's run: its rows, where they and its images lie in the batch, and how many images each invoke has."""

    job: Interpreter
    run: int
    first: int
    longest: int
    most: int
    rows: list[Row]
    pad: int
    image: int = 0
    images: Sequence[int] = ()
    steps: int = 0
    over: bool = False
    last: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.job.plan.last_step[self.run]

    def span(self, total: int, step: int) -> Span:
        """Its part of the batch at one step."""
        before = total - self.longest
        if step == 0:
            return Span(self.first, len(self.rows), before, self.longest, before, self.longest)
        return Span(self.first, len(self.rows), 0, 1, before, self.longest + step)

    def tokens(self) -> Tensor:
        """All ids [rows, positions], padded on the left to the longest prompt, on the right where a row ended."""
        width = self.longest + self.steps
        out = torch.full((len(self.rows), width), self.pad, dtype=torch.int64, device=self.rows[0].ids.device)
        for index, row in enumerate(self.rows):
            before = self.longest - row.prompt
            out[index, before : before + row.ids.shape[1]] = row.ids[0]
        return out

    def finish(self) -> None:
        """Hand out the ids and what was gathered; steps that were never reached stay absent."""
        self.over = True
        if self.job.error is not None:
            return
        with self.job.guard():
            for node in self.job.plan.nodes("tokens"):
                if node.run == self.run:
                    self.job.provide(node.id, self.tokens())
        self.job.end_run(self.run)


class Generation:
    """Several runs that generate together. Their rows are padded on the left to the longest."""

    def __init__(
        self, loaded: Loaded, group: Sequence[tuple[Interpreter, int]], fed: Sequence[Sequence[Piece]]
    ) -> None:
        rows = [[row for piece in run for row in piece.rows] for run in fed]
        self._loaded = loaded
        self._model: Any = loaded.model
        self._device = loaded.device
        self._width = max(len(row) for own in rows for row in own)
        self._count = sum(map(len, rows))
        # Padded on the left alone, as the rows are here.
        self._tensors = joined(
            [[piece for run in fed for piece in run]], loaded.feeding.inputs, self._device
        ).tensors
        name = loaded.feeding.images
        images = [[len(piece.tensors.get(name, ())) for piece in run] for run in fed]
        self._images = sum(map(sum, images))
        places = zip(starts([len(own) for own in rows]), starts(list(map(sum, images))), images, strict=True)
        self._parts = []
        for (job, run), (first, image, counts), own in zip(group, places, rows, strict=True):
            with job.guard():
                self._parts.append(replace(self._growing(job, run, first, own), image=image, images=counts))
        self._all = [row for own in rows for row in own]

    def run(self) -> None:
        """Generate until every run has ended, or nobody asks for more."""
        ids = torch.tensor(
            [[FILL] * (self._width - len(row)) + list(row) for row in self._all], device=self._device
        )
        mask = torch.tensor(
            [[0] * (self._width - len(row)) + [1] * len(row) for row in self._all], device=self._device
        )
        state: dict[str, Any] = {"attention_mask": mask, "use_cache": True, **self._tensors}
        if self._loaded.feeding.states(self._tensors):
            state["position_ids"] = positions(mask) + (self._loaded.feeding.offset or 0)
        step = 0
        while any(not part.over for part in self._parts):
            inputs = self._model.prepare_inputs_for_generation(
                ids, next_sequence_length=1 if step else None, is_first_iteration=step == 0, **state
            )
            output = self._step(inputs, mask, step)
            state = self._model._update_model_kwargs_for_generation(output, state)
            ids = torch.cat([ids, self._choose(output.logits[:, -1], step)], dim=1)
            step += 1

    def _step(self, inputs: dict[str, Any], mask: Tensor, step: int) -> Any:
        length = self._width if step == 0 else 1
        placed = []
        for part in self._parts:
            if not part.over:
                placed.append(self._place(part, mask, step))
        whole = Span.whole(self._count, length, self._width + step, 0 if step else self._images)
        forward = Forward(self._loaded, placed, whole, complete=True)
        output = forward.run({**inputs, "return_dict": True})
        forward.finish()
        return output

    def _place(self, part: Growing, mask: Tensor, step: int) -> Placed:
        span = replace(part.span(self._width, step), image=part.image, images=sum(part.images))
        placed = place(part.job, part.run, span, step, part.images)
        if step == 0:
            placed.give_mask(mask)
        with part.job.guard():
            if part.job.sink.cancelled():
                raise JobCancelled("cancelled while running")
        part.job.begin_step(part.run, step)
        return placed

    def _choose(self, logits: Tensor, step: int) -> Tensor:
        """The next token of every row of the batch, [rows, 1]; rows that have ended get padding."""
        chosen = torch.full((self._count, 1), FILL, dtype=torch.int64, device=self._device)
        for part in self._parts:
            if part.over:
                continue
            with part.job.guard():
                new = [
                    None if row.ended else row.choose(logits[index : index + 1])
                    for index, row in enumerate(part.rows, part.first)
                ]
                for index, token in enumerate(new, part.first):
                    chosen[index] = FILL if token is None else token  # a pad may be any number the user gave
                if part.job.plan.graph.runs[part.run].options.get("stream"):
                    part.job.sink.tokens(part.run, step, new)
            part.steps = step + 1
            ended = part.job.error is not None or all(row.ended for row in part.rows)
            if ended or part.steps >= part.most or (part.last is not None and step >= part.last):
                part.finish()
        return chosen

    def _growing(self, job: Interpreter, run: int, first: int, rows: Sequence[Sequence[int]]) -> Growing:
        if not getattr(self._model, "can_generate", bool)():
            raise BadArgument(f"{self._loaded.manifest.model} has no head to generate with")
        options = job.plan.graph.runs[run].options
        own = {name: value for name, value in options.items() if name not in _OURS and value is not None}
        most = new_tokens(job.plan.graph.runs[run])
        try:
            config, _ = self._model._prepare_generation_config(None, **own | {"max_new_tokens": most})
            self._model._prepare_special_tokens(config, True, device=self._device)
            made = [self._row(row, _seed(job, run, index), config, options) for index, row in enumerate(rows)]
        except (ValueError, TypeError) as error:
            raise BadArgument(f"generate: {str(error).splitlines()[0][:200]}") from error
        pad = config._pad_token_tensor
        fill = FILL if pad is None else max(int(pad), FILL)
        return Growing(job, run, first, max(map(len, rows)), most, made, fill)

    def _row(self, row: Sequence[int], seed: int, config: Any, options: Mapping[str, Any]) -> Row:
        ids = torch.tensor([list(row)], device=self._device)
        processors = self._model._get_logits_processor(
            config, input_ids_seq_length=len(row), encoder_input_ids=ids, device=str(self._device)
        )
        ends = config.eos_token_id
        stops = options.get("stop_strings") or ()
        generator = None
        if config.do_sample:
            generator = torch.Generator(self._device)
            generator.manual_seed(seed)
        return Row(
            ids,
            processors,
            generator,
            frozenset([ends] if isinstance(ends, int) else ends or ()),
            bool(config.do_sample),
            (stops,) if isinstance(stops, str) else tuple(stops),
            self._tokenizer if stops else None,
        )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        data = self._loaded.tokenizer_bytes
        if data is None:
            raise BadArgument("stop_strings need a tokenizer, and this model has none")
        return Tokenizer.from_str(data.decode())


def _seed(job: Interpreter, run: int, row: int) -> int:
    """What a row draws from. Rows of one run have different streams; the first's is the one of the run's seed."""
    given = job.plan.graph.runs[run].options.get("seed")
    if given is not None:
        return int(given) + row
    return job.seeds.setdefault((run, row), secrets.randbits(63))
