"""Tables in the docs that say what code says too."""

from __future__ import annotations

import re
from pathlib import Path

from interpose.errors import BY_CODE, InterposeError
from interpose.graph.named import BLOCK, MODEL
from interpose_server.broker.failures import SENTENCES
from interpose_server.broker.states import ModelState
from interpose_server.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "eight": 8, "nine": 9, "ten": 10, "eleven": 11}


def rows(page: str) -> list[list[str]]:
    """The cells of a page's tables, their heads left out."""
    lines = re.findall(r"^\| (`.*) \|$", (DOCS / page).read_text(), re.M)
    return [line.split(" | ") for line in lines]


def test_every_error_is_told() -> None:
    told = {code.strip("`"): (name, meaning) for code, name, meaning in rows("errors.md")}
    order = [code for code in BY_CODE if code != InterposeError.code] + [InterposeError.code]
    assert list(told) == order
    for code, (name, meaning) in told.items():
        assert BY_CODE[code].__name__ == name
        counted = re.search(r"(?:any of|or) the (\w+) below", meaning)
        below = [error for error in BY_CODE.values() if BY_CODE[code] in error.__bases__]
        assert code == InterposeError.code or (NUMBERS[counted[1]] if counted else 0) == len(below)


def test_every_python_kind_is_told() -> None:
    text = (DOCS / "errors.md").read_text().rpartition("\n\n")[2]
    for kind in (AttributeError, LookupError, TypeError, ValueError, IndexError, ConnectionError):
        of = [error for error in BY_CODE.values() if issubclass(error, kind)]
        assert of
        assert all(f"`{known.__name__}`" in text for known in (kind, *of))


def test_every_named_point_is_told() -> None:
    told = [name for names, *_ in rows("named-points.md") for name in re.findall(r"`(\w+)`", names)]
    assert set(told) == {*BLOCK, *MODEL}
    assert len(told) == len(set(told))


def test_states_and_reasons_are_all_told() -> None:
    told = [cells[0].strip("`") for cells in rows("models-lifecycle.md")]
    reasons = told.index("gated")
    assert set(told[:reasons]) == set(ModelState)
    assert set(told[reasons:]) == SENTENCES.keys()
    text = (DOCS / "models-lifecycle.md").read_text()
    for name in ("hold_s", "patience_s", "scale_jobs", "scale_wait_s", "load_retry_s"):
        assert f"`INTERPOSE_SERVER_{name.upper()}` ({Settings.model_fields[name].default:g})" in text
