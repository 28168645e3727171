"""Standard names of hook points: where each family keeps its values, and proof that they are what it says."""

from .families import FAMILIES, Family
from .settling import Findings, Refused, alike, offering, refused_with, search, settle

__all__ = ["FAMILIES", "Family", "Findings", "Refused", "alike", "offering", "refused_with", "search", "settle"]
