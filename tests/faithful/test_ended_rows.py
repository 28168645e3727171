"""What a step gives of rows whose text has ended while others go on, against each row decoded alone by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decoding import Decoded, decode
from interpose.errors import NotReached
from twins import alive, close, same

NAME, BLOCK = "tiny-gpt2", "transformer.h.1"
ROWS = ([5, 6, 7], [21, 90, 11])
NEW = 7
LEAST = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Case:
    """Two rows, and the token that ends row 0 at `last`, its last step, and row 1 never."""

    model: Any
    options: dict[str, Any]
    twin: Any
    alone: tuple[Decoded, Decoded]
    end: int
    last: int


@pytest.fixture
def case(place: Any, stock: Callable[..., Any]) -> Case:
    twin = stock(NAME).model
    alone = decode(twin, ROWS[0], NEW), decode(twin, ROWS[1], NEW)
    new = [one.tokens[0, 3:].tolist() for one in alone]
    last = next(step for step in range(1, NEW - 2) if new[0][step] not in new[0][:step] + new[1])
    options = {"max_new_tokens": NEW, "eos_token_id": new[0][last], **place.options}
    return Case(place.open(NAME), options, twin, alone, new[0][last], last)


def test_lists_hold_nan_and_least_integers(case: Case) -> None:
    model = case.model
    with model.generate(list(ROWS), **case.options) as tracer, tracer.all():
        hidden = model.transformer.h[1].output[0].save()
        tokens = model.output[:, -1].argmax(-1).save()
        best = model.output[:, -1].topk(2).indices.save()
        norms = model.transformer.h[1].output[0][:, -1].norm(dim=-1).mean().save()
        high = (model.output[:, -1] > 0).save()
        safe = torch.where(tracer.alive, model.output[:, -1].argmax(-1), -1).save()
        goes_on = tracer.alive.save()
    assert list(map(len, (hidden, tokens, best, norms, high, safe, goes_on))) == [NEW] * 7
    for step in range(NEW):
        over = step > case.last
        for row in (0, 1):
            wanted = case.alone[row][step, BLOCK][:, -1]
            logits = case.alone[row][step, ""][:, -1]
            if over and row == 0:
                assert hidden[step][0].isnan().all()
                assert tokens[step][0] == LEAST
                assert (best[step][0] == LEAST).all()
                continue
            alive(wanted)
            close(hidden[step][row : row + 1, -1], wanted)
            assert tokens[step][row] == logits.argmax()
            assert best[step][row].tolist() == logits.topk(2).indices[0].tolist()
        assert bool(norms[step].isnan()) == over
        assert (high[step] is None) == over
        assert goes_on[step].tolist() == [not over, True]
        assert safe[step][0] == (-1 if over else case.alone[0][step, ""][:, -1].argmax())


def test_explicit_steps(case: Case) -> None:
    model, late = case.model, case.last + 1
    with model.generate(list(ROWS), **case.options) as tracer:
        with tracer.iter[late]:
            hidden = model.transformer.h[1].output[0].save()
            high = (hidden > 0).save()
            other = (hidden[1] > 0).save()
            goes_on = tracer.alive.save()
        for _ in tracer.iter[case.last : late]:
            before = model.transformer.h[1].output[0].save()
    assert hidden[0].isnan().all()
    close(hidden[1:], case.alone[1][late, BLOCK])
    assert torch.equal(other, case.alone[1][late, BLOCK][0] > 0)
    assert goes_on.tolist() == [False, True]
    close(before[:1], case.alone[0][case.last, BLOCK])
    with pytest.raises(NotReached, match="ended"):
        high.sum()


def test_an_invoke_that_has_ended_gives_nothing(case: Case) -> None:
    model, late = case.model, case.last + 1
    with model.generate(**case.options) as tracer:
        with tracer.invoke(ROWS[0]), tracer.all():
            mine = model.transformer.h[1].output[0].save()
            tokens = model.output[:, -1].argmax(-1).save()
            model.transformer.h[0].output[0][:] *= 1  # no error once nobody is left to see it
            tracer.log("at", tokens)
        with tracer.invoke(ROWS[1]), tracer.all():
            theirs = model.transformer.h[1].output[0].save()
    assert [value is None for value in mine] == [step > case.last for step in range(NEW)]
    assert [value is None for value in tokens] == [step > case.last for step in range(NEW)]
    for step in range(late):
        close(mine[step], case.alone[0][step, BLOCK])
    for step in range(NEW):
        close(theirs[step], case.alone[1][step, BLOCK])
    with model.generate(**case.options) as tracer:
        with tracer.invoke(ROWS[0]), tracer.iter[late]:
            never = model.transformer.h[1].output[0].save()
        with tracer.invoke(ROWS[1]), tracer.all():
            model.output.save()
    with pytest.raises(NotReached, match="ended"):
        never.sum()


def test_an_invoke_that_has_ended_decides_and_writes_nothing(case: Case) -> None:
    model = case.model
    with model.generate(**case.options) as tracer:
        with tracer.invoke(ROWS[0]), tracer.all():
            norm = model.transformer.h[0].output[0].norm()
            tracer.cond(norm > 0, lambda: model.transformer.h[1].output[0].save())
        with tracer.invoke(ROWS[1]):
            tokens = tracer.result.save()
    assert tokens[1].tolist() == case.alone[1].tokens[0].tolist()
    with pytest.raises(NotReached, match="ended"), model.generate(**case.options) as tracer:
        with tracer.invoke(ROWS[0]), tracer.iter[case.last + 1]:
            mine = model.transformer.h[0].output[0]
        with tracer.invoke(ROWS[1]), tracer.iter[case.last + 1]:
            model.transformer.h[0].output[0] = mine
            model.output.save()


def test_rows_that_go_on_take_nothing_from_those_that_ended(case: Case) -> None:
    model, late = case.model, case.last + 1
    with model.generate(list(ROWS), **case.options) as tracer, tracer.iter[late:]:
        own = model.transformer.h[0].output[0]
        own[:] = torch.where(own.norm(dim=-1, keepdim=True) > 0, own * -0.5, own)
        logits = model.output[:, -1].save()
    edits = {(step, "transformer.h.0"): lambda hidden: hidden * -0.5 for step in range(late, NEW)}
    edited = decode(case.twin, ROWS[1], NEW, edits)
    assert not torch.allclose(edited[NEW - 1, ""], case.alone[1][NEW - 1, ""])
    for step in range(late, NEW):
        close(logits[step - late][1:], edited[step, ""][:, -1])
    writes: tuple[Callable[[Any], Any], ...] = (
        lambda own: own + 0 * own.mean(0, keepdim=True),
        lambda own: torch.where(own.mean() > -1e9, own, 0.0),
    )
    for write in writes:
        with (
            pytest.raises(NotReached, match=r"t\.alive"),
            model.generate(list(ROWS), **case.options) as tracer,
            tracer.all(),
        ):
            own = model.transformer.h[0].output[0]
            own[:] = write(own)
            model.output.save()


def test_alone_it_ends_and_the_rest_is_absent(case: Case) -> None:
    model = case.model
    with model.generate([ROWS[0]], **case.options) as tracer:
        with tracer.all():
            hidden = model.transformer.h[1].output[0].save()
        with tracer.iter[case.last + 1]:
            never = model.output.save()
        tokens = tracer.result.save()
    assert len(hidden) == case.last + 1
    same(tokens, case.alone[0].tokens[:, : 3 + case.last + 1])
    with pytest.raises(NotReached):
        never.sum()
