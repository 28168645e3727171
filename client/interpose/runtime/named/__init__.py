"""Standard names of hook points: where each family keeps its values, and proof that they are what it says."""

from .families import FAMILIES, Family
from .settling import Findings, offering, refused_with, search, settle

__all__ = ["FAMILIES", "Family", "Findings", "offering", "refused_with", "search", "settle"]
