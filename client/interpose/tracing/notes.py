"""Things worth saying once."""

from __future__ import annotations

import sys

_told: set[str] = set()


def note(text: str) -> None:
    """Print a line on stderr, the first time it is said in this process."""
    if text not in _told:
        _told.add(text)
        print(f"interpose: {text}", file=sys.stderr)
