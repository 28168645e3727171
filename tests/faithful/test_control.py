"""Conditions and loops where the model runs: equal to the same written in Python on real values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding import decode
from interpose.errors import NotReached
from twins import close, run, same

GPT2 = "tiny-gpt2"
ROW = [5, 9, 33, 7]
BLOCK = "transformer.h.1"


@pytest.fixture
def model(place: Any) -> Any:
    return place.open(GPT2)


@pytest.fixture
def twin(stock: Callable[..., Any]) -> Any:
    return stock(GPT2)


def by_hand(twin: Any, edit: Callable[[torch.Tensor], torch.Tensor] | None = None, row: list[int] = ROW) -> Any:
    return run(twin.model, {"input_ids": torch.tensor([row])}, {BLOCK: edit} if edit else None)


def flip(hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden.clone()
    hidden[:, -1] *= -1
    return hidden


# -- conditions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", [True, False])
def test_a_condition_chooses_a_value(place: Any, model: Any, twin: Any, above: bool) -> None:
    seen = by_hand(twin)
    middle = float(seen["transformer.h.0"].norm()) + (-1 if above else 1)
    with model.trace(ROW, **place.options) as tracer:
        early = model.transformer.h[0].output[0]
        value = tracer.cond(early.norm() > middle, lambda: early * 2, lambda: early - 1).save()
        one, two = tracer.cond(early.norm() > middle, lambda: (early.sum(), 1.0), lambda: (early.mean(), 2.0))
        one.save(), two.save()
    hidden = seen["transformer.h.0"]
    same(value, hidden * 2 if above else hidden - 1)
    close(one, hidden.sum() if above else hidden.mean())
    assert float(two) == (1.0 if above else 2.0)


@pytest.mark.parametrize("above", [True, False])
def test_a_condition_decides_over_writes(place: Any, model: Any, twin: Any, above: bool) -> None:
    seen = by_hand(twin)
    middle = float(seen["transformer.h.0"].norm()) + (-1 if above else 1)

    def change() -> Any:
        before = model.transformer.h[1].output[0].sum().save()
        model.transformer.h[1].output[0][:, -1] *= -1
        return before

    with model.trace(ROW, **place.options) as tracer:
        inside: list[Any] = []
        tracer.cond(model.transformer.h[0].output[0].norm() > middle, lambda: inside.append(change()))
        logits = model.output.save()
    expected = by_hand(twin, flip)[""]
    assert not torch.allclose(expected, seen[""])
    same(logits, expected if above else seen[""])
    if above:
        close(inside[0], seen[BLOCK].sum())
    else:
        with pytest.raises(NotReached, match="branch"):
            _ = inside[0] + 1


def test_conditions_nest(place: Any, model: Any, twin: Any) -> None:
    hidden = by_hand(twin)["transformer.h.0"]
    for one in (-1e9, 1e9):
        for two in (-1e9, 1e9):
            with model.trace(ROW, **place.options) as tracer:
                value = model.transformer.h[0].output[0]

                def inner(value: Any = value, tracer: Any = tracer, two: float = two) -> Any:
                    return tracer.cond(value.sum() > two, lambda: value * 3, lambda: value * 5)

                found = tracer.cond(value.sum() > one, inner, lambda value=value: value * 7).save()
            close(found, hidden * (7 if one > 0 else 5 if two > 0 else 3))


def test_both_ways_write(place: Any, model: Any, twin: Any) -> None:
    def write(factor: float) -> None:
        model.transformer.h[1].output[0][:, -1] *= factor

    with model.trace([ROW, ROW[::-1]], **place.options) as tracer:
        first = model.transformer.h[0].output[0]
        tracer.cond(first[0, 0, 0] > first[1, 0, 0], lambda: write(-1), lambda: write(4))
        logits = model.output.save()
    rows = {"input_ids": torch.tensor([ROW, ROW[::-1]])}
    seen = run(twin.model, rows)["transformer.h.0"]
    factor = -1 if seen[0, 0, 0] > seen[1, 0, 0] else 4

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, -1] *= factor
        return hidden

    same(logits, run(twin.model, rows, {BLOCK: edit})[""])


def test_a_condition_at_every_step(place: Any, model: Any, twin: Any) -> None:
    plain = decode(twin.model, ROW, 6)
    sums = [float(plain[step, "transformer.h.0"][:, -1].sum()) for step in range(6)]
    middle = sorted(sums)[3]
    with model.generate(ROW, max_new_tokens=6, eos_token_id=-1, **place.options) as tracer:
        with tracer.all():
            early = model.transformer.h[0].output[0][:, -1].sum()

            def change() -> None:
                model.transformer.h[1].output[0][:, -1] *= -1

            tracer.cond(early > middle, change)
            early.save()
        tokens = tracer.result.save()

    ids, expected = list(ROW), torch.tensor([ROW])
    taken: set[int] = set()
    for step in range(6):  # which steps are changed depends on the changes before
        decoded = decode(twin.model, ids, step + 1, {(at, BLOCK): flip for at in taken})
        if float(decoded[step, "transformer.h.0"][:, -1].sum()) > middle:
            taken.add(step)
        expected = decode(twin.model, ids, step + 1, {(at, BLOCK): flip for at in taken}).tokens
    assert 0 < len(taken) < 6
    assert torch.equal(tokens, expected)


def test_a_condition_known_to_python_is_pythons(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        hidden = model.transformer.h[1].output[0]
        value = tracer.cond(hidden.shape[1] > 3, lambda: hidden * 2, lambda: hidden.nonsense()).save()
    same(value, by_hand(twin)[BLOCK] * 2)


# -- loops -------------------------------------------------------------------------------------------------------


def test_a_loop(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        hidden = model.transformer.h[0].output[0]
        end = tracer.loop(5, lambda turn, x: torch.tanh(x * 1.5) + turn * 0.1, hidden)
        pair = tracer.loop(3, lambda turn, x, n: (x + hidden.mean(), n * 2 + turn), hidden[:, -1], 1)
        model.transformer.h[1].output[0][:] = end
        logits = model.output.save()
        pair[0].save(), pair[1].save()
    x = hidden0 = by_hand(twin)["transformer.h.0"]
    for turn in range(5):
        x = torch.tanh(x * 1.5) + turn * 0.1
    expected = by_hand(twin, lambda _: x)[""]
    close(logits, expected)
    y, n = hidden0[:, -1], 1
    for turn in range(3):
        y, n = y + hidden0.mean(), n * 2 + turn
    close(pair[0], y)
    assert int(pair[1]) == n


@pytest.mark.parametrize("most", [2, 50])
def test_a_loop_with_an_end(place: Any, model: Any, twin: Any, most: int) -> None:
    with model.trace(ROW, **place.options) as tracer:
        hidden = model.transformer.h[0].output[0]
        end, turns = tracer.while_loop(
            lambda x, n: x.norm() > 0.5, lambda turn, x, n: (x * 0.7, n + 1), hidden, 0, most=most
        )
        end.save(), turns.save()
    x, n = by_hand(twin)["transformer.h.0"], 0
    while x.norm() > 0.5 and n < most:
        x, n = x * 0.7, n + 1
    close(end, x)
    assert int(turns) == n > 1


def test_a_loop_that_never_turns(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        hidden = model.transformer.h[0].output[0]
        end = tracer.while_loop(lambda x: x.norm() < 0, lambda turn, x: x * 0, hidden, most=9).save()
    same(end, by_hand(twin)["transformer.h.0"])


def test_a_scan_gathers(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        hidden = model.transformer.h[0].output[0]
        end, norms = tracer.scan(4, lambda turn, x: (x * 0.5, x.norm() + turn), hidden)
        end.save(), norms.save()
    x, expected = by_hand(twin)["transformer.h.0"], []
    for turn in range(4):
        expected.append(x.norm() + turn)
        x = x * 0.5
    close(end, x)
    close(norms, torch.stack(expected))


def test_loops_nest(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        hidden = model.transformer.h[0].output[0]

        def outer(turn: Any, x: Any) -> Any:
            return tracer.loop(2, lambda inner, y: y * 0.9 + turn + inner * x.mean(), x)

        found = tracer.loop(3, outer, hidden).save()
    x = by_hand(twin)["transformer.h.0"]
    for turn in range(3):
        y = x
        for inner in range(2):
            y = y * 0.9 + turn + inner * x.mean()
        x = y
    close(found, x, 1e-4)


def test_modules_and_weights_in_a_loop(place: Any, model: Any, twin: Any) -> None:
    """Iterated decoding of one hidden state: module calls and writes to values within a turn."""
    with model.trace(ROW, **place.options) as tracer:

        def body(turn: Any, x: Any) -> Any:
            y = model.transformer.h[2].ln_1(x) @ model.transformer.wte.weight.T[:, :64]
            y[:, 0] = 0
            return y / y.norm()

        found = tracer.loop(3, body, model.transformer.h[0].output[0]).save()
    with torch.no_grad():
        x = by_hand(twin)["transformer.h.0"]
        for _ in range(3):
            x = twin.model.transformer.h[2].ln_1(x) @ twin.model.transformer.wte.weight.T[:, :64]
            x[:, 0] = 0
            x = x / x.norm()
    close(found, x)


def test_a_loop_in_a_branch(place: Any, model: Any, twin: Any) -> None:
    for sign in (1, -1):
        with model.trace(ROW, **place.options) as tracer:
            hidden = model.transformer.h[0].output[0]
            found = tracer.cond(
                hidden.norm() * sign > 0,
                lambda hidden=hidden, tracer=tracer: tracer.loop(3, lambda turn, x: x * 2, hidden),
                lambda hidden=hidden: hidden,
            ).save()
        same(found, by_hand(twin)["transformer.h.0"] * (8 if sign > 0 else 1))


def test_a_loop_at_every_step(place: Any, model: Any, twin: Any) -> None:
    with model.generate(ROW, max_new_tokens=4, eos_token_id=-1, **place.options) as tracer:
        with tracer.all():
            last = model.transformer.h[1].output[0][:, -1]
            model.transformer.h[1].output[0][:, -1] = tracer.loop(3, lambda turn, x: -x * (turn + 1), last) / 3
            norms = tracer.loop(2, lambda turn, x: x * 2, last).norm().save()
        tokens = tracer.result.save()

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, -1] *= -2
        return hidden

    expected = decode(twin.model, ROW, 4, {(step, BLOCK): edit for step in range(4)})
    assert not torch.equal(expected.tokens, decode(twin.model, ROW, 4).tokens)
    assert torch.equal(tokens, expected.tokens)
    assert len(norms) == 4
    for step, norm in enumerate(norms):
        close(norm, 4 * expected[step, BLOCK][:, -1].norm())


def test_names_from_outside_a_body_stay_what_they_were(place: Any, model: Any, twin: Any) -> None:
    with model.generate(ROW, max_new_tokens=4, eos_token_id=-1, **place.options) as tracer:
        first = model.transformer.h[0].output[0]
        last = first[:, -1]
        with tracer.iter[1:]:
            model.transformer.h[0].output[0][:, -1] += last
            summed, now = last.sum().save(), model.transformer.h[0].output[0].sum().save()
            tracer.loop(2, lambda turn, x: x + last.mean(), 0.0).save()
        tokens = tracer.result.save()
        again = last.sum().save()
    before = decode(twin.model, ROW, 1)[0, "transformer.h.0"][:, -1]

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, -1] += before
        return hidden

    expected = decode(twin.model, ROW, 4, {(step, "transformer.h.0"): edit for step in (1, 2, 3)})
    assert not torch.equal(expected.tokens, decode(twin.model, ROW, 4).tokens)
    assert torch.equal(tokens, expected.tokens)
    for step in range(3):
        close(summed[step], before.sum())
        close(now[step], expected[step + 1, "transformer.h.0"].sum())
    close(again, before.sum())


def test_names_from_outside_a_branch_can_be_used_after_it(place: Any, model: Any, twin: Any) -> None:
    with model.trace(ROW, **place.options) as tracer:
        hidden = model.transformer.h[0].output[0]
        row = hidden[0]
        hidden[:, 0] = 0
        inside = tracer.cond(hidden.sum() < 1e9, lambda: row.mean(), lambda: row.sum()).save()
        computed = hidden * 2
        part = computed[0]
        computed[:, 1] = 1
        other = tracer.cond(hidden.sum() < 1e9, lambda: part.mean(), lambda: part.sum()).save()
        after, last = row.mean().save(), part.mean().save()
    wanted = by_hand(twin)["transformer.h.0"].clone()
    wanted[:, 0] = 0
    close(inside, wanted.mean())
    close(after, wanted.mean())
    wanted = wanted * 2
    wanted[:, 1] = 1
    close(other, wanted.mean())
    close(last, wanted.mean())
