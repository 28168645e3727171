"""What stands for the value of a node that has none."""

from __future__ import annotations


class NoValue:
    """A node came to nothing."""


SKIPPED = NoValue()
"""It lies in a branch that wasn't taken."""

ABSENT = NoValue()
"""It comes from a prompt whose text had ended."""

LATER = NoValue()
"""It has to wait for others' calls of the same layer."""
