"""What `interpose` exports is complete, sorted, and nothing but names of its own parts."""

from __future__ import annotations

import ast
from pathlib import Path

import interpose

SOURCE = Path(interpose.__file__)


def test_all_is_complete_and_sorted() -> None:
    tree = ast.parse(SOURCE.read_text("utf-8"))
    imported = [
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(imported) == sorted(interpose.__all__)
    assert interpose.__all__ == sorted(
        interpose.__all__, key=lambda name: (not name.isupper(), name.islower(), name)
    )
    assert all(hasattr(interpose, name) for name in interpose.__all__)


def test_the_package_only_exports() -> None:
    kinds = {type(node) for node in ast.parse(SOURCE.read_text("utf-8")).body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}


def test_packages_have_empty_or_exporting_inits() -> None:
    for path in SOURCE.parent.rglob("__init__.py"):
        kinds = {type(node) for node in ast.parse(path.read_text("utf-8")).body}
        assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, path
