"""Telling a model that doesn't run on what it was given from a fault of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_OF_INPUTS = (ValueError, RuntimeError, IndexError, TypeError)
_OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)


class Refused(Exception):
    """The model's own code raised `error` on its inputs."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def refusing(ours: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Around the model's own code: what it raises for its inputs becomes Refused.

    Args:
        ours: whether the code under way is ours, called by a hook.
    """
    try:
        yield
    except _OF_THE_DEVICE:
        raise
    except _OF_INPUTS as error:
        if ours():
            raise
        raise Refused(error) from error
