"""What a block recorded, as a thing of its own: to print, save, load, and run on another prompt or model."""

from .program import Program

__all__ = ["Program"]
