"""Texts that grow: each row of a generation with its own processors, its own random generator, its own end.

What to do with the logits is the transformers library's: its processors, its defaults, its order. So what a row
gets doesn't depend on its neighbours.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import BadArgument, OpFailed, first_line
from ..graph.generation import new_tokens
from .inputs import FILL
from .interpreter import Interpreter
from .loading import Loaded
from .pieces import Piece
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
    """One job's run while it generates.

    Attributes:
        first, image: where its rows and images lie in the batch.
        images: how many images each invoke has.
        longest: its longest prompt.
        most: new tokens at most.
        steps: tokens chosen so far.
        pad: what stands where a row has ended.
    """

    job: Interpreter
    run: int
    fed: Sequence[Piece]
    longest: int
    most: int
    rows: list[Row]
    pad: int
    first: int = 0
    image: int = 0
    images: Sequence[int] = ()
    steps: int = 0
    over: bool = False
    last: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.job.plan.last_step[self.run]

    def span(self, width: int) -> Span:
        """Its part of a batch of so many positions, the newest included."""
        before = width - self.longest - self.steps
        if self.steps == 0:
            return Span(
                self.first, len(self.rows), before, self.longest, before, self.longest, self.image, sum(self.images)
            )
        return Span(self.first, len(self.rows), 0, 1, before, self.longest + self.steps)

    def choose(self, logits: Tensor) -> list[int | None]:
        """Each row's next token for logits [rows, vocabulary]; None where it had ended. Tells who asked for it."""
        new = [None if row.ended else row.choose(logits[index : index + 1]) for index, row in enumerate(self.rows)]
        if self.job.plan.graph.runs[self.run].options.get("stream"):
            self.job.sink.tokens(self.run, self.steps, new)
        return new

    def stepped(self) -> None:
        """One more step is done; it may have been the last."""
        step, self.steps = self.steps, self.steps + 1
        ended = self.job.error is not None or all(row.ended for row in self.rows)
        if ended or self.steps >= self.most or (self.last is not None and step >= self.last):
            self._finish()

    def tokens(self) -> Tensor:
        """All ids [rows, positions], padded on the left to the longest prompt, on the right where a row ended."""
        width = self.longest + self.steps
        out = torch.full((len(self.rows), width), self.pad, dtype=torch.int64, device=self.rows[0].ids.device)
        for index, row in enumerate(self.rows):
            before = self.longest - row.prompt
            out[index, before : before + row.ids.shape[1]] = row.ids[0]
        return out

    def _finish(self) -> None:
        """Hand out the ids and what was gathered; steps that were never reached stay absent."""
        self.over = True
        if self.job.error is not None:
            return
        with self.job.guard():
            for node in self.job.plan.nodes("tokens"):
                if node.run == self.run:
                    self.job.provide(node.id, self.tokens())
        self.job.end_run(self.run)


@dataclass(frozen=True)
class Grower:
    """Begins texts as a model's own `generate` would."""

    loaded: Loaded

    def begin(self, job: Interpreter, run: int, fed: Sequence[Piece]) -> Growing:
        """Raises BadArgument: the model has no head, or doesn't take these options."""
        model: Any = self.loaded.model
        if not getattr(model, "can_generate", bool)():
            raise BadArgument(f"{self.loaded.manifest.model} has no head to generate with")
        rows = [row for piece in fed for row in piece.rows]
        options = job.plan.graph.runs[run].options
        own = {name: value for name, value in options.items() if name not in _OURS and value is not None}
        most = new_tokens(job.plan.graph.runs[run])
        try:
            config, _ = model._prepare_generation_config(None, **own | {"max_new_tokens": most})
            model._prepare_special_tokens(config, True, device=self.loaded.device)
            made = [self._row(row, _seed(job, run, index), config, options) for index, row in enumerate(rows)]
        except (ValueError, TypeError) as error:
            raise BadArgument(f"generate: {first_line(error)}") from error
        pad = config._pad_token_tensor
        fill = FILL if pad is None else max(int(pad), FILL)
        images = [len(piece.tensors.get(self.loaded.feeding.images, ())) for piece in fed]
        return Growing(job, run, fed, max(map(len, rows)), most, made, fill, images=images)

    def _row(self, row: Sequence[int], seed: int, config: Any, options: Mapping[str, Any]) -> Row:
        model: Any = self.loaded.model
        ids = torch.tensor([list(row)], device=self.loaded.device)
        processors = model._get_logits_processor(
            config, input_ids_seq_length=len(row), encoder_input_ids=ids, device=str(self.loaded.device)
        )
        ends = config.eos_token_id
        stops = options.get("stop_strings") or ()
        generator = None
        if config.do_sample:
            generator = torch.Generator(self.loaded.device)
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
        data = self.loaded.tokenizer_bytes
        if data is None:
            raise BadArgument("stop_strings need a tokenizer, and this model has none")
        return Tokenizer.from_str(data.decode())


def _seed(job: Interpreter, run: int, row: int) -> int:
    """What a row draws from. Rows of one run have different streams; the first's is the one of the run's seed."""
    given = job.plan.graph.runs[run].options.get("seed")
    if given is not None:
        return int(given) + row
    return job.seeds.setdefault((run, row), secrets.randbits(63))
