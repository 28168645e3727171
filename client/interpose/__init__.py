"""Interpose: read and change the inside of a neural network that runs somewhere else."""

from .config import CONFIG
from .errors import InterposeError
from .models import LanguageModel

__all__ = ["CONFIG", "InterposeError", "LanguageModel"]
