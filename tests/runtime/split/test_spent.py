"""What a job may do is bounded for the whole of it: on however many shards, as on the model in one piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from interpose import LanguageModel
from interpose.errors import LimitExceeded
from interpose.graph.limits import UNLIMITED, Limits
from interpose.runtime.engine import Engine
from interpose.runtime.spent import Spent
from test_graphs import ROW, language, parts, shards

WIDTH = 64


def some(value: Any) -> Any:
    """Much work of a size that no shape tells before: how many are above the mean."""
    chosen = value.masked_select(value > value.mean())
    square = chosen[:, None] * chosen[None]
    return (square @ square).sum().tanh()


def forward(model: LanguageModel) -> None:
    h = model.transformer.h
    with model.trace(ROW):
        for block in h:
            some(block.output).save()
        some(model.logits[0, -1]).save()


def mail(model: LanguageModel) -> None:
    """Each shard works on what the one before it has sent, and home between them."""
    h = model.transformer.h
    with model.trace(ROW):
        carried = some(h[0].output)
        carried = some(h[1].output + carried)
        h[2].output[:] = model.transformer.ln_f(h[1].output) + carried
        some(h[2].output).save()


def backward(model: LanguageModel) -> None:
    h = model.transformer.h
    with model.trace(ROW):
        read = [block.output for block in h]
        with model.logits.square().sum().backward():
            for hidden in reversed(read):
                some(hidden.grad).save()


def steps(model: LanguageModel) -> None:
    h = model.transformer.h
    with model.generate(ROW, max_new_tokens=3) as t, t.all():
        for block in h:
            some(block.output).save()


def session(model: LanguageModel) -> None:
    """The second run comes to shards that have worked for the first, and to one that hasn't."""
    h = model.transformer.h
    with model.session():
        for blocks in (h[1:], h):
            with model.trace(ROW):
                for block in blocks:
                    some(block.output).save()


def questions(model: LanguageModel) -> None:
    """What another site's module makes is counted by who asks."""
    h = model.transformer.h
    with model.trace(ROW):
        for block in h:
            chosen = block.mlp.output.masked_select(block.mlp.output > 0)[: 2 * WIDTH].reshape(-1, WIDTH)
            square = model.transformer.ln_f(chosen) @ chosen.T
            block.output[:] = block.output + (square @ square).sum()
        model.logits.save()


PROGRAMS = (forward, mail, backward, steps, session, questions)


def refused(use: Callable[[LanguageModel], None], count: int, limits: Limits) -> LimitExceeded | None:
    """How a program ends on so many shards, 0 for one process."""
    run = Engine.run

    def limited(self: Engine, jobs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        return run(self, [replace(job, limits=limits) for job in jobs], *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run", limited)
        try:
            use(language(count))
        except LimitExceeded as error:
            return error
        finally:
            assert not count or parts(shards("gpt2", count)) == 0
    return None


def flops(use: Callable[[LanguageModel], None]) -> list[int]:
    """Of the counted nodes of a program, in one process."""
    found: list[int] = []
    add = Spent.add

    def noted(self: Spent, flops: int) -> None:
        found.append(flops)
        add(self, flops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spent, "add", noted)
        assert refused(use, 0, UNLIMITED) is None
    return found


@pytest.mark.parametrize("use", PROGRAMS, ids=lambda use: use.__name__)
def test_all_shards_together_may_do_what_one_process_may(use: Callable[[LanguageModel], None]) -> None:
    total = sum(flops(use))
    assert total > 0
    for count in (0, 3):
        assert refused(use, count, replace(UNLIMITED, flops=total)) is None
        error = refused(use, count, replace(UNLIMITED, flops=total - 1))
        assert error is not None
        assert error.details["limit"] == "flops"
        assert error.details["asked"] == total
        assert __file__ in str(error.source)


@pytest.mark.parametrize("use", [forward, mail, steps, session, questions], ids=lambda use: use.__name__)
def test_it_ends_at_the_node_at_which_it_would_in_one_process(use: Callable[[LanguageModel], None]) -> None:
    done = sorted({*accumulate(flops(use))})
    for limit in done[len(done) // 4 : -1 : 3]:
        expected = refused(use, 0, replace(UNLIMITED, flops=limit))
        found = refused(use, 3, replace(UNLIMITED, flops=limit))
        assert expected is not None
        assert found is not None
        assert (found.node, found.op, found.details, found.source) == (
            expected.node, expected.op, expected.details, expected.source,
        )  # fmt: skip


def test_memory_is_bounded_for_each_process() -> None:
    def use(model: LanguageModel) -> None:
        """A large value at each block, until the backward comes by."""
        h = model.transformer.h
        with model.trace(ROW):
            outputs = [block.output for block in h]
            all_of = [hidden.masked_select(hidden > -1e9) for hidden in outputs]
            kept = [values[:, None] * values[None] for values in all_of]
            with model.logits.square().sum().backward():
                for square, hidden in zip(kept, outputs, strict=True):
                    (square * hidden.grad.sum()).sum().save()

    one = (len(ROW) * WIDTH) ** 2 * 4
    held = replace(UNLIMITED, memory_bytes=8 * one)
    assert refused(use, 0, held) is not None
    assert refused(use, 3, held) is None
    error = refused(use, 3, replace(UNLIMITED, memory_bytes=3 * one))
    assert error is not None
    assert error.details["limit"] == "memory_bytes"
