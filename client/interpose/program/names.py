"""What a program calls the values it gives: by the user's own variable where the line tells."""

from __future__ import annotations

import ast
import linecache
from collections import Counter
from collections.abc import Mapping

from ..errors import Source
from ..graph.model import Graph


def save_names(graph: Graph, given: Mapping[int, str]) -> dict[int, str]:
    """A name for every save.

    The one given; else the variable that the save's line assigns it to, if no other save has that name; else its
    index among the saves.

    Args:
        given: save node -> the name the user gave it.
    """
    guessed = {node.id: variable(node.source) for node in graph.saves if node.id not in given}
    taken = Counter([*given.values(), *guessed.values()])
    names = {}
    for index, node in enumerate(graph.saves):
        guess = guessed.get(node.id)
        names[node.id] = given.get(node.id) or (guess if guess and taken[guess] == 1 else _free(index, taken))
    return names


def _free(index: int, taken: Mapping[str | None, int]) -> str:
    return str(index) if str(index) not in taken else f"#{index}"


def variable(source: Source | None) -> str | None:
    """The variable of a line such as `h = model.layers[3].output.save()`, None for any other line."""
    if source is None:
        return None
    try:
        body = ast.parse(linecache.getline(source.file, source.line).strip()).body
    except (SyntaxError, ValueError):
        return None
    match body:
        case [ast.Assign(targets=[ast.Name(id=name)], value=value)] | [
            ast.AnnAssign(target=ast.Name(id=name), value=value)
        ]:
            pass
        case _:
            return None
    match value:
        case ast.Call(func=ast.Attribute(attr="save")) | ast.Call(func=ast.Name(id="save")):
            return name
    return None
