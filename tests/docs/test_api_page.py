"""docs/api.md has every public name of what a notebook holds, and none that isn't there."""

from __future__ import annotations

import inspect
import re
from typing import Any

import interpose
from interpose import Job, LanguageModel
from interpose.graph.generation import OPTIONS
from interpose.tracing.deferred import Deferred
from interpose.tracing.handles import COMMON, Module
from interpose.tracing.tracer import Tracer
from test_reference_pages import DOCS, PAGES, chapter, rows

INNER = {"model", "recorder"}
"""Attributes of a block that its own parts use."""
ACCEPTED = {"prompt", "scan", "validate"}
"""Of blocks: what isn't in the table of arguments. The latter two are nnsight's, and say nothing."""


def names(title: str, *, column: int = 0) -> list[str]:
    cells = [row[column] for row in rows(chapter("api.md", title))]
    return [name for cell in cells for name in re.findall(r"`(?:t\.)?(\w+)`", cell)]


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def arguments(function: Any) -> set[str]:
    found = inspect.signature(function).parameters.values()
    return {one.name for one in found if one.kind is not one.VAR_KEYWORD} - {"self"}


def test_everything_exported_is_told() -> None:
    assert sorted(names("## From `interpose`")) == sorted(interpose.__all__)


def test_a_model_has_what_is_told() -> None:
    told = names("## A model")
    made = arguments(LanguageModel.__init__) - {"source"}
    assert len(told) == len(set(told)) + len(made & public(LanguageModel))
    assert set(told) == made | public(LanguageModel) - public(Module)


def test_a_block_takes_what_is_told() -> None:
    told = set(names("## Opening a block"))
    trace, generate, session = map(arguments, (LanguageModel.trace, LanguageModel.generate, LanguageModel.session))
    assert told == (trace | generate) - ACCEPTED
    assert session == told - {"trace", "stream"}


def test_a_block_has_what_is_told() -> None:
    told = names("## In a block")
    assert len(told) == len(set(told))
    assert set(told) == public(Tracer) - INNER


def test_no_page_names_what_a_block_hasnt() -> None:
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
        named = {name for text in re.findall(r"`[^`]+`", prose) for name in re.findall(r"\bt\.([a-z_]+)", text)}
        assert named <= public(Tracer), page.name


def test_modules_values_and_jobs_have_what_is_told() -> None:
    assert set(names("## A module")) == public(Module) | {*COMMON, "functions", "source"}
    assert set(names("## A value")) <= public(Deferred)
    assert set(names("## A job")) <= public(Job) | set(Job.__init__.__code__.co_names)


def test_every_option_of_a_generation_is_told() -> None:
    text = (DOCS / "generation.md").read_text("utf-8")
    assert [name for name in OPTIONS if f"`{name}`" not in text] == ["stream"]
    assert "(streaming.md)" in text
