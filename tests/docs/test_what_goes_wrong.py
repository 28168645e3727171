"""What the pages say can go wrong does, with the error they name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interpose import LanguageModel, errors
from models import tiny

DOCS = Path(__file__).parents[2] / "docs"
PROMPT, LONGER = [3, 4, 5], [3, 4, 5, 6]
AT_A_SERVER = {("activation-analysis", "LimitExceeded"), ("sessions", "LimitExceeded")}
"""With all of remote.md: tried by tests of servers."""

Case = Callable[[Any, Any], object]
CASES: list[tuple[str, str, Case]] = []


def case(page: str, error: str) -> Callable[[Case], Case]:
    def enter(mistake: Case) -> Case:
        CASES.append((page, error, mistake))
        return mistake

    return enter


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(str(tiny("gpt2")))


@case("activation-analysis", "NotSaved")
def unsaved(model: Any, h: Any) -> None:
    with model.trace(PROMPT):
        lost = h[0].output[0]
        model.output.save()
    _ = lost + 1


@case("activation-analysis", "ControlFlow")
@case("control-flow", "ControlFlow")
def a_number(model: Any, h: Any) -> None:
    with model.trace(PROMPT):
        float(h[0].output[0].norm())


@case("activation-analysis", "UnknownModule")
def another_models_name(model: Any, h: Any) -> None:
    with model.trace(PROMPT):
        model.model.layers[0].output.save()


@case("control-flow", "BadArgument")
def a_point_in_a_loop(model: Any, h: Any) -> None:
    with model.trace(PROMPT) as t:
        t.loop(2, lambda turn, value: value + h[1].output[0], h[0].output[0])


@case("control-flow", "BadArgument")
def a_value_carried_out(model: Any, h: Any) -> None:
    kept: list[Any] = []
    with model.trace(PROMPT) as t:
        t.cond(h[0].output[0].norm() > 1, lambda: kept.append(h[1].output[0] * 1), lambda: None)
        (kept[0] * 2).save()


@case("control-flow", "ShapeMismatch")
def carried_in_another_shape(model: Any, h: Any) -> None:
    with model.trace(PROMPT) as t:
        t.loop(2, lambda turn, value: value[:, :1], h[0].output[0]).save()


@case("control-flow", "WrongOrder")
def a_condition_that_comes_late(model: Any, h: Any) -> None:
    with model.trace(PROMPT) as t:
        t.cond(h[1].output[0].norm() > 1, lambda: h[0].output[0].zero_() and None, lambda: None)


@case("cross-prompt", "WrongOrder")
@case("patching", "WrongOrder")
def from_late_to_early(model: Any, h: Any) -> None:
    with model.trace() as t:
        with t.invoke(PROMPT):
            late = h[2].output[0]
        with t.invoke(PROMPT):
            h[1].output[0][:] = late


@case("cross-prompt", "ShapeMismatch")
@case("patching", "ShapeMismatch")
def between_lengths(model: Any, h: Any) -> None:
    with model.trace() as t:
        with t.invoke(PROMPT):
            source = h[1].output[0]
        with t.invoke(LONGER):
            h[1].output[0][:] = source


@case("cross-prompt", "BadArgument")
def nested(model: Any, h: Any) -> None:
    with model.trace() as t, t.invoke(PROMPT), t.invoke(PROMPT):
        pass


@case("generation", "BadArgument")
def a_step_beyond(model: Any, h: Any) -> None:
    with model.generate(PROMPT, max_new_tokens=2) as t, t.iter[5]:
        h[0].output.save()


@case("generation", "LimitExceeded")
def beyond_the_positions(model: Any, h: Any) -> None:
    with model.generate(PROMPT, max_new_tokens=100_000) as t:
        t.result.save()


@case("gradients", "BadArgument")
def without_a_loss(model: Any, h: Any) -> None:
    with model.trace(PROMPT):
        h[0].output[0].grad.save()


@case("gradients", "BadArgument")
def later_than_the_loss(model: Any, h: Any) -> None:
    with model.trace(PROMPT):
        loss = h[0].output[0].sum()
        with loss.backward():
            h[1].output[0].grad.save()


@case("gradients", "NotReached")
def of_another_prompt(model: Any, h: Any) -> None:
    with model.trace() as t:
        with t.invoke(PROMPT):
            apart = h[0].output[0]
        with t.invoke(PROMPT), model.output[0, -1].max().backward():
            apart.grad.save()


@case("sessions", "DeferredError")
def of_another_model(model: Any, h: Any) -> None:
    with model.session(), LanguageModel(str(tiny("llama"))).trace(PROMPT):
        pass


@case("sessions", "ControlFlow")
def between_two_traces(model: Any, h: Any) -> None:
    with model.session():
        with model.trace(PROMPT):
            best = model.output[0, -1].argmax()
        assert best > 3


@pytest.mark.parametrize(("page", "error", "mistake"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_it_goes_wrong_as_told(model: LanguageModel, page: str, error: str, mistake: Case) -> None:
    with pytest.raises(errors.InterposeError) as caught:
        mistake(model, model.transformer.h)
    assert type(caught.value).__name__ == error


def test_all_that_is_told_is_tried() -> None:
    told: Counter[tuple[str, str]] = Counter()
    for path in DOCS.glob("*.md"):
        chapter = path.read_text("utf-8").partition("## What can go wrong")[2].partition("\n## ")[0]
        names = [
            name
            for line in re.findall(r"^- (`\w+`.*?)[:,] ", chapter, re.M)
            for name in re.findall(r"`(\w+)`", line)
        ]
        assert all(issubclass(getattr(errors, name), errors.InterposeError) for name in names)
        told.update((path.stem, name) for name in names)
    tried = Counter((page, error) for page, error, _ in CASES)
    assert tried == Counter({key: n for key, n in told.items() if key[0] != "remote" and key not in AT_A_SERVER})
