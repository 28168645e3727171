"""Standard names of hook points: where each family keeps its values, and proof that they are what it says."""

from .families import FAMILIES, Family
from .settling import refused_with, settle

__all__ = ["FAMILIES", "Family", "refused_with", "settle"]
