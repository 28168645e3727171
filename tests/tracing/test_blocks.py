"""Blocks in every place Python has for them; what fails in one leaves nothing behind."""

from __future__ import annotations

import asyncio
import code
import contextlib
import io
import threading
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import BadArgument, DeferredError, IndexOutOfRange, InterposeError
from interpose.runtime.hooks import CURRENT
from interpose.tracing.tracer import ACTIVE
from models import tiny

ROW = [5, 9, 33, 7]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")))


@pytest.fixture(scope="module")
def expected(model: Any) -> torch.Tensor:
    with model.trace(ROW):
        logits = model.output.save()
    return logits.value


@pytest.fixture(autouse=True)
def nothing_stays_open(model: Any) -> Any:
    yield
    assert ACTIVE.get() is None
    assert CURRENT.get() is None
    for module in model._model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


ONE_LINE = "with model.trace(row): logits = model.output.save()\n"
LINES = "with model.trace(row) as t:\n    logits = model.output.save()\n\n"


@pytest.mark.parametrize("text", [ONE_LINE, LINES, f"if True:\n    {ONE_LINE}"])
def test_exec(model: Any, expected: torch.Tensor, text: str) -> None:
    names: dict[str, Any] = {"model": model, "row": ROW}
    exec(text, names)
    assert torch.equal(names["logits"], expected)


def test_a_console(model: Any, expected: torch.Tensor) -> None:
    console = code.InteractiveConsole({"model": model, "row": ROW})
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        for line in LINES.split("\n"):
            console.push(line)
    assert not errors.getvalue()
    assert torch.equal(console.locals["logits"], expected)  # type: ignore[arg-type]


def test_functions_loops_and_comprehensions(model: Any, expected: torch.Tensor) -> None:
    def norms(blocks: Any) -> dict[int, Any]:
        return {index: block.output[0].norm().save() for index, block in enumerate(blocks)}

    def traced() -> Any:
        with model.trace(ROW):
            return norms(model.transformer.h), [model.output.save() for _ in range(2)]

    found, logits = traced()
    assert sorted(found) == [0, 1, 2]
    assert all(norm > 0 for norm in found.values())
    assert all(torch.equal(each, expected) for each in logits)

    def each_row() -> Any:
        for row in (ROW, ROW[:2]):
            with model.trace(row):
                logits = model.output.save()
            yield logits

    assert [logits.shape[1] for logits in each_row()] == [4, 2]


def test_an_error_in_the_block_runs_nothing(model: Any, expected: torch.Tensor) -> None:
    calls: list[int] = []
    handle = model._model.register_forward_pre_hook(lambda *_: calls.append(1))
    saved = None
    try:
        with pytest.raises(ZeroDivisionError), model.trace(ROW):
            saved = model.output.save()
            _ = 1 / 0
        with pytest.raises(ZeroDivisionError), model.trace() as tracer, tracer.invoke(ROW):
            _ = 1 / 0
    finally:
        handle.remove()
    assert not calls
    assert saved is not None
    with pytest.raises(InterposeError):
        _ = saved + 1
    with model.trace(ROW):
        logits = model.output.save()
    assert torch.equal(logits, expected)


def test_an_error_while_running_names_the_line(model: Any) -> None:
    with pytest.raises(IndexOutOfRange, match="embedding") as caught, model.trace(ROW):
        ids = model.output.argmax(-1) + 400
        found = torch.nn.functional.embedding(ids, model.transformer.wte.weight)  # the line at fault
        found.save()
    assert "# the line at fault" in str(caught.value)
    assert caught.value.source is not None
    assert caught.value.source.file == __file__


@pytest.mark.parametrize("prompt", [[], [[]], [[1], []], [1.5], [[1, [2]]], object(), [-1], torch.zeros(1, 2, 3)])
def test_a_bad_prompt_opens_nothing(model: Any, prompt: Any) -> None:
    with pytest.raises(BadArgument), model.trace(prompt):
        pass


def test_blocks_do_not_nest(model: Any, expected: torch.Tensor) -> None:
    with model.trace(ROW):
        with pytest.raises(DeferredError, match="invoke"), model.trace(ROW):
            pass
        logits = model.output.save()
    with model.trace() as tracer, tracer.invoke(ROW), pytest.raises(BadArgument, match="nest"), tracer.invoke(ROW):
        pass
    assert torch.equal(logits, expected)


def test_a_block_without_anything_runs_nothing(model: Any) -> None:
    ran: list[int] = []
    hook = model._model.register_forward_pre_hook(lambda *_: ran.append(1))
    with model.trace(ROW):
        pass
    with model.trace(ROW):
        _ = model.output
    hook.remove()
    assert not ran


def traced(model: Any, number: int) -> torch.Tensor:
    """A block that only this number's owner would write."""
    with model.trace([number + 5, 9, number + 7]):
        model.transformer.h[0].output[0][:, number % 3] = number
        logits = model.output.save()
    return logits.value


def test_threads_have_their_own_blocks(model: Any) -> None:
    expected = [traced(model, number) for number in range(6)]
    found: dict[int, torch.Tensor] = {}
    start = threading.Barrier(6)

    def work(number: int) -> None:
        start.wait()
        for _ in range(3):
            found[number] = traced(model, number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(6))


async def test_tasks_have_their_own_blocks(model: Any) -> None:
    async def work(number: int) -> torch.Tensor:
        with model.trace([number + 5, 9, number + 7]):
            hidden = model.transformer.h[0].output[0]
            await asyncio.sleep(0.001 * (number % 3))
            hidden[:, number % 3] = number
            logits = model.output.save()
        return logits.value

    found = await asyncio.gather(*(work(number) for number in range(6)))
    assert all(torch.equal(found[number], traced(model, number)) for number in range(6))
