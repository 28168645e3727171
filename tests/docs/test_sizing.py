"""The sizing table is what the planner says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_tables_are_as_the_planner_has_them() -> None:
    spec = importlib.util.spec_from_file_location("sizing", ROOT / "scripts" / "sizing.py")
    assert spec is not None and spec.loader is not None
    sizing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizing)
    text = sizing.PAGE.read_text("utf-8")
    assert sizing.filled(text) == text, "run scripts/sizing.py"
