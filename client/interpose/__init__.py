"""Interpose: read and change the inside of a neural network that runs somewhere else."""

from .client import Job, jobs
from .config import CONFIG
from .errors import InterposeError
from .models import LanguageModel
from .program import Program
from .tracing.keeping import save

__all__ = ["CONFIG", "InterposeError", "Job", "LanguageModel", "Program", "jobs", "save"]
