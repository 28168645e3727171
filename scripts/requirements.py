"""Print what extras of pyproject.toml ask for, one requirement a line: `requirements.py [EXTRA ...]`.

An image installs these before the source is copied, so that a change of the source rebuilds the last layer alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

OURS = re.compile(r"interpose\[([\w,-]+)\]$")


def requirements(project: Mapping[str, Mapping[str, Sequence[str]]], extras: Sequence[str]) -> list[str]:
    """The package's own requirements and those of extras, which may name one another."""
    found = [*project["dependencies"], *_of(project["optional-dependencies"], extras)]
    return list(dict.fromkeys(found))


def _of(optional: Mapping[str, Sequence[str]], extras: Sequence[str]) -> Iterator[str]:
    for extra in extras:
        for requirement in optional[extra]:
            if ours := OURS.match(requirement):
                yield from _of(optional, ours[1].split(","))
            else:
                yield requirement


def main(extras: Sequence[str]) -> None:
    root = Path(__file__).resolve().parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    print(*requirements(project, extras), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
