"""Notebook-like scripts with the block in every place Python lets one write it, local and remote, against hooks."""

from __future__ import annotations

import ast
import code
import contextlib
import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from serving import Served
from twins import run, same

NAME = "tiny-gpt2"
PROMPT = "The capital of France is"
PATH = "transformer.h.1"

PLACES = {
    "at the top": """
        with model.trace(prompt, **options) as t:
            model.transformer.h[1].output[0][:, -1] *= 2
            logits = model.output.save()
    """,
    "one line": """
        h = model.transformer.h
        with model.trace(prompt, **options): h[1].output[0][:, -1] *= 2; logits = model.output.save()
    """,
    "a function": """
        def traced(text):
            with model.trace(text, **options):
                model.transformer.h[1].output[0][:, -1] *= 2
                return model.output.save()

        logits = traced(prompt)
    """,
    "a loop": """
        for scale in (3, 2):
            with model.trace(prompt, **options):
                model.transformer.h[1].output[0][:, -1] *= scale
                logits = model.output.save()
    """,
    "a condition and a try": """
        if prompt:
            try:
                with model.trace(prompt, **options):
                    model.transformer.h[1].output[0][:, -1] *= 2
                    logits = model.output.save()
            finally:
                done = True
    """,
    "a comprehension": """
        def traced(scale):
            with model.trace(prompt, **options):
                hidden = [block.output[0] for block in model.transformer.h]
                hidden[1][:, -1] *= scale
                return model.output.save()

        logits = [traced(scale) for scale in (3, 2)][-1]
    """,
    "a lambda": """
        def within(body):
            with model.trace(prompt, **options):
                return body()

        def double():
            model.transformer.h[1].output[0][:, -1] *= 2

        logits = within(lambda: (double(), model.output.save()))[1]
    """,
    "a method": """
        class Experiment:
            def __enter__(self):
                self.block = model.trace(prompt, **options)
                return self.block.__enter__()

            def __exit__(self, *error):
                return self.block.__exit__(*error)

        with Experiment():
            model.transformer.h[1].output[0][:, -1] *= 2
            logits = model.output.save()
    """,
    "a generator": """
        def traces():
            for scale in (3, 2):
                with model.trace(prompt, **options):
                    model.transformer.h[1].output[0][:, -1] *= scale
                    logits = model.output.save()
                yield logits

        *_, logits = traces()
    """,
    "a coroutine": """
        import asyncio

        async def traced():
            with model.trace(prompt, **options):
                await asyncio.sleep(0)
                model.transformer.h[1].output[0][:, -1] *= 2
                return model.output.save()

        logits = asyncio.run(traced())
    """,
    "a thread": """
        from concurrent.futures import ThreadPoolExecutor

        def traced(scale):
            with model.trace(prompt, **options):
                model.transformer.h[1].output[0][:, -1] *= scale
                return model.output.save()

        with ThreadPoolExecutor(2) as pool:
            logits = list(pool.map(traced, (3, 2)))[-1]
    """,
    "a session": """
        with model.session(**options):
            with model.trace(prompt):
                plain = model.transformer.h[1].output[0]
            with model.trace(prompt):
                model.transformer.h[1].output[0][:, -1] = plain[:, -1] * 2
                logits = model.output.save()
    """,
}


def doubled(hidden: torch.Tensor) -> torch.Tensor:
    new = hidden.clone()
    new[:, -1] *= 2
    return new


@pytest.fixture
def expected(stock: Callable[..., Any]) -> torch.Tensor:
    twin = stock(NAME)
    inputs = twin.inputs(PROMPT)
    moved = run(twin.model, inputs, {PATH: doubled})[""]
    assert not torch.equal(moved, run(twin.model, inputs)[""])
    return moved


@pytest.mark.parametrize("script", PLACES.values(), ids=PLACES.keys())
def test_exec(script: str, place: Any, expected: torch.Tensor) -> None:
    names = {"model": place.open(NAME), "prompt": PROMPT, "options": place.options}
    exec(textwrap.dedent(script), names)
    same(names["logits"], expected)


def test_cells(place: Any, expected: torch.Tensor) -> None:
    """As IPython runs a cell: each statement compiled by itself, in the names of those before."""
    names: dict[str, Any] = {"model": place.open(NAME), "prompt": PROMPT, "options": place.options}
    for number, script in enumerate(PLACES.values()):
        names.pop("logits", None)
        for statement in ast.parse(textwrap.dedent(script)).body:
            cell = ast.Module([statement], type_ignores=[])
            exec(compile(cell, f"<ipython-input-{number}>", "exec"), names)
        same(names["logits"], expected)


def test_console(place: Any, expected: torch.Tensor) -> None:
    console = code.InteractiveConsole({"model": place.open(NAME), "prompt": PROMPT, "options": place.options})
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        for line in [*textwrap.dedent(PLACES["at the top"]).splitlines(), ""]:
            console.push(line)
    assert not errors.getvalue()
    same(console.locals["logits"], expected)  # type: ignore[arg-type]


@pytest.mark.slow
def test_interactive_python(served: Served, expected: torch.Tensor) -> None:
    typed = f"""
        from interpose import LanguageModel
        model, prompt, options = LanguageModel({NAME!r}), {PROMPT!r}, {{"remote": True}}
        {textwrap.dedent(PLACES["at the top"]).strip().replace(chr(10), chr(10) + " " * 8)}

        print(logits.double().sum().item())
        nothing = model.transformer.h[1].output
    """
    done = subprocess.run(
        [sys.executable, "-i", "-q"],
        input=textwrap.dedent(typed),
        capture_output=True,
        text=True,
        env=os.environ | served.env,
    )
    assert float(done.stdout.strip()) == pytest.approx(expected.double().sum().item(), rel=1e-6)
    assert "DeferredError" in done.stderr and "Warning" not in done.stderr
