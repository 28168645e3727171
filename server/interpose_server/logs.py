"""One line an event on stderr. No prompts, tensors or keys."""

from __future__ import annotations

import logging
import sys


def setup(name: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format=f"%(asctime)s {name} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
