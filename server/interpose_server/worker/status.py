"""How a worker's process tells its parent why it ended. Imports nothing, so that the parent needs no torch."""

from __future__ import annotations

USELESS_TO_RETRY = 78
"""Exit status: the model can't be served as asked; starting again changes nothing."""
