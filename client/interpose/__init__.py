"""Interpose: read and change the inside of a neural network that runs somewhere else."""

from .client import Job, jobs
from .config import CONFIG
from .errors import InterposeError
from .models import LanguageModel
from .program import Program
from .tracing.keeping import save
from .vision import VisionLanguageModel
from .wrapping import Model

__all__ = [
    "CONFIG",
    "InterposeError",
    "Job",
    "LanguageModel",
    "Model",
    "Program",
    "VisionLanguageModel",
    "jobs",
    "save",
]
