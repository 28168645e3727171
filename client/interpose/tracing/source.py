"""Finding the user's line: the nearest frame outside this package and the libraries it is called through."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import FrameType

from ..errors import Source


def _folder(name: str) -> str:
    spec = importlib.util.find_spec(name)
    return str(Path(spec.origin).parent) + "/" if spec and spec.origin else "\0"


_LIBRARIES = (str(Path(__file__).parents[1]) + "/", _folder("torch"), _folder("numpy"), _folder("einops"))
_inside: dict[str, bool] = {}
"""File name -> whether it belongs to a library, for every file met so far."""


def caller() -> Source:
    """The line that is being run in the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        inside = _inside.get(file)
        if inside is None:
            inside = _inside[file] = file.startswith(_LIBRARIES)
        if not inside:
            return Source(file, frame.f_lineno)
        frame = frame.f_back
    return Source("<unknown>", 0)
