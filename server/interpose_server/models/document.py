"""A YAML file of an operator: its content, and the line on which each thing stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from interpose.errors import ConfigError

from ..mistakes import Mistake

MOST = 10
"""Mistakes that are told at a time."""

MOST_NODES = 1_000_000
"""Values of a file; a short one can stand for billions, by aliases of aliases."""


@dataclass(frozen=True, slots=True)
class Document:
    """Attributes: plain: what it says, None where it's empty."""

    path: Path
    plain: Any
    _node: yaml.Node | None = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Document:
        """Raises ConfigError, which names the line."""
        try:
            loader = yaml.SafeLoader(path.read_text("utf-8"))
            node = loader.get_single_node()
            if node is not None and _size(node, {}) > MOST_NODES:
                raise ConfigError(f"{path}: its aliases stand for more than {MOST_NODES:,} values")
            if node is not None and (twice := _twice(node, set())) is not None:
                raise ConfigError(f"{path}:{_line(twice)}: the key {twice.value!r} stands there twice")
            return cls(path, None if node is None else loader.construct_document(node), node)
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{path}:{mark.line + 1}" if mark else f"{path}"
            tab = "; lines are indented with spaces" if "'\\t'" in str(error.problem) else ""
            raise ConfigError(f"{where}: this is no YAML: {error.problem or error.context}{tab}") from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise ConfigError(f"{path} is no YAML: {error}") from error

    def refused(self, wrong: Sequence[Mistake]) -> ConfigError:
        """An error that tells of mistakes, a line each, as they stand in the file."""
        told = sorted((self._line(mistake), str(mistake)) for mistake in wrong)
        lines = [f"{self.path}{f':{line}' if line else ''}: {text}" for line, text in told[:MOST]]
        return ConfigError("\n".join([*lines, *(["..."] if len(told) > MOST else [])]))

    def _line(self, mistake: Mistake) -> int:
        """Where it stands, or what it is missing from; 0 in an empty file."""
        node = self._node
        if node is None:
            return 0
        found = node
        for index, part in enumerate(mistake.place):
            key, value = _child(node, part)
            if value is None:
                break
            last = index == len(mistake.place) - 1
            found = key if key is not None and (last or isinstance(value, yaml.ScalarNode)) else value
            node = value
        return _line(found)


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node | None, yaml.Node | None]:
    """Key and value at a place."""
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return None, node.value[part]
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return key, value
    return None, None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Of how many nodes one consists, what an alias stands for counted wherever it does."""
    if id(node) not in known:
        known[id(node)] = 1  # as it counts within itself
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] += sum(_size(part, known) for part in parts)
    return known[id(node)]


def _twice(node: yaml.Node, seen: set[int]) -> yaml.ScalarNode | None:
    """A key that a mapping has twice, of which the first would be ignored."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return None
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return next((found for item in node.value if (found := _twice(item, seen))), None)
    names: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in names and key.value != "<<":
                return key
            names.add(key.value)
        if (found := _twice(value, seen)) is not None:
            return found
    return None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
