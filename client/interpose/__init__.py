"""Interpose: read and change the inside of a neural network that runs somewhere else."""

from .config import CONFIG
from .errors import InterposeError
from .models import LanguageModel
from .tracing.keeping import save

__all__ = ["CONFIG", "InterposeError", "LanguageModel", "save"]
