"""Names of a library that aren't public ones: where something is missing, that is said, and by which version."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from operator import attrgetter
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Internals:
    """What is used of one library beyond its public names. They are looked up when they are used.

    Attributes:
        library: its package.
        tried: the version with which all of it was tried.
        needed: module -> names in it, of attributes of classes too.
    """

    library: str
    tried: str
    needed: Mapping[str, tuple[str, ...]]

    def check(self) -> None:
        """Raises ConfigError if anything is missing."""
        for module, names in self.needed.items():
            for name in names:
                self.part(module, name)

    def part(self, module: str, name: str) -> Any:
        """Raises ConfigError."""
        assert name in self.needed[module], "what isn't listed isn't checked"
        try:
            return attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self._has} has no {module}.{name}; {self._advice}") from error

    @contextmanager
    def shaped(self, what: str, *errors: type[Exception]) -> Iterator[None]:
        """These errors mean that something has another form than it had. Raises ConfigError, which says what."""
        try:
            yield
        except errors as error:
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{self._has} has {what} in another form ({why}); {self._advice}") from error

    @property
    def _has(self) -> str:
        return f"{self.library} {version(self.library)}"

    @property
    def _advice(self) -> str:
        return f"this version of Interpose was tried with {self.library} {self.tried}"
