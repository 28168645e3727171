"""What stands for the value of a node in a branch that wasn't taken."""

from __future__ import annotations


class Skipped:
    """The value of a node in a branch that wasn't taken."""


SKIPPED = Skipped()
