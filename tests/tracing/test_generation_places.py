"""Generations, sessions and gradients in every place Python has for a block; one result wherever they stand."""

from __future__ import annotations

import asyncio
import code
import contextlib
import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.runtime.hooks import CURRENT
from interpose.tracing.tracer import ACTIVE, SESSION
from models import tiny

ROW = [5, 9, 33, 7]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")))


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    yield
    assert ACTIVE.get() is None
    assert SESSION.get() is None
    assert CURRENT.get() is None


PROGRAM = """
with model.session() as session:
    with model.trace(row) as t:
        hidden = model.transformer.h[1].output[0][:, -1]
        with model.output[0, -1, 3].backward():
            gradient = hidden.grad.save()
    with model.generate(row, max_new_tokens=4, eos_token_id=-1) as t:
        for step in t.iter[1:3]:
            model.transformer.h[1].output[0][:, -1] += hidden + gradient * step
        with t.all():
            norms = model.output.norm().save()
        tokens = t.result.save()

"""
ONE_LINE = (
    "with model.generate(row, max_new_tokens=4) as t: model.transformer.h[0].output[0][:] *= 2; n = t.result.save()"
)


@pytest.fixture(scope="module")
def expected(model: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"model": model, "row": ROW}
    exec(PROGRAM, names)
    with model.generate(ROW, max_new_tokens=4, eos_token_id=-1) as tracer:
        plain = tracer.result.save()
    assert not torch.equal(plain, names["tokens"])
    assert len(names["norms"]) == 4
    assert names["gradient"].abs().max() > 0
    return names


def agree(names: Any, expected: dict[str, Any]) -> None:
    assert torch.equal(names["tokens"], expected["tokens"])
    assert torch.equal(names["gradient"], expected["gradient"])
    assert torch.equal(torch.stack(names["norms"]), torch.stack(expected["norms"]))


def indented(text: str) -> str:
    return "\n".join("    " + line if line else line for line in text.split("\n"))


@pytest.mark.parametrize(
    "text",
    [
        PROGRAM,
        f"for _ in range(2):\n{indented(PROGRAM)}",
        f"def run():\n{indented(PROGRAM)}\n    globals().update(locals())\nrun()\n",
        f"class Holder:\n{indented(PROGRAM)}\nglobals().update(vars(Holder))\n",
        f"try:\n{indented(PROGRAM)}\nfinally:\n    pass\n",
    ],
    ids=["bare", "loop", "function", "class", "try"],
)
def test_exec(model: Any, expected: dict[str, Any], text: str) -> None:
    names: dict[str, Any] = {"model": model, "row": ROW}
    exec(text, names)
    agree(names, expected)


def test_a_console(model: Any, expected: dict[str, Any]) -> None:
    console = code.InteractiveConsole({"model": model, "row": ROW})
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        for line in PROGRAM.lstrip("\n").split("\n"):
            console.push(line)
    assert not errors.getvalue()
    agree(console.locals, expected)


def test_an_interpreter_and_one_line(model: Any) -> None:
    names: dict[str, Any] = {"model": model, "row": ROW}
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert not code.InteractiveInterpreter(names).runsource(ONE_LINE + "\n")
    assert not errors.getvalue()
    with model.generate(ROW, max_new_tokens=4) as tracer:
        model.transformer.h[0].output[0][:] *= 2
        tokens = tracer.result.save()
    assert torch.equal(names["n"], tokens)


def test_a_comprehension(model: Any) -> None:
    def generated(row: list[int]) -> Any:
        with model.generate(row, max_new_tokens=3, eos_token_id=-1) as tracer:
            return [model.output.norm().save() for _ in tracer.iter[:]], tracer.result.save()

    found = [generated(row) for row in (ROW, ROW[:2], ROW)]
    assert [len(norms) for norms, _ in found] == [3, 3, 3]
    assert [tokens.shape[1] for _, tokens in found] == [7, 5, 7]
    assert torch.equal(found[0][1], found[2][1])
    assert not torch.equal(found[0][0][0], found[1][0][0])


def traced(model: Any, number: int) -> torch.Tensor:
    """A generation that only this number's owner would write."""
    with model.session():
        with model.trace([number + 5, 9]):
            vector = model.transformer.h[0].output[0][:, -1]
        with model.generate([number + 5, 9, number + 7], max_new_tokens=4, eos_token_id=-1) as tracer:
            for step in tracer.iter[:]:
                model.transformer.h[0].output[0][:, -1] += vector * (number - step)
            tokens = tracer.result.save()
    return tokens.value


def test_threads(model: Any) -> None:
    expected = [traced(model, number) for number in range(4)]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        found[number] = traced(model, number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], wanted) for number, wanted in enumerate(expected))
    assert len({tuple(tokens[0].tolist()) for tokens in expected}) == 4


async def test_tasks(model: Any) -> None:
    expected = [traced(model, number) for number in range(3)]

    async def work(number: int) -> torch.Tensor:
        with model.generate([number + 5, 9, number + 7], max_new_tokens=4, eos_token_id=-1) as tracer:
            await asyncio.sleep(0.001 * (3 - number))
            for step in tracer.iter[:]:
                model.transformer.h[0].output[0][:, -1] += kept[number] * (number - step)
                await asyncio.sleep(0)
            tokens = tracer.result.save()
        return tokens.value

    kept = []
    for number in range(3):
        with model.trace([number + 5, 9]):
            kept.append(model.transformer.h[0].output[0][:, -1].save())
    found = await asyncio.gather(*map(work, range(3)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_leaving_a_loop_over_steps_early(model: Any) -> None:
    with model.generate(ROW, max_new_tokens=6, eos_token_id=-1) as tracer:
        for step in tracer.iter[1:]:
            hidden = model.transformer.h[1].output[0].save()
            if step == 2:
                break
        first = model.transformer.h[1].output[0].save()
        tokens = tracer.result.save()
    assert hidden.shape == (1, 1, 64)
    assert first.shape == (1, 4, 64)
    assert tokens.shape == (1, 10)
