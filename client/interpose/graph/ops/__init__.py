"""The closed table of tensor operations: what each takes, gives and costs. No torch here."""

from .binding import bind
from .declare import MANY, Op, Param, Signature
from .infer import Cost, cost, infer, measure
from .kinds import UNKNOWN
from .kinds import is_spec as is_tensor
from .spellings import INPLACE, OPERATORS, SPELLINGS
from .table import OPS, lookup, nearest, outputs_of

__all__ = [
    "INPLACE",
    "MANY",
    "OPERATORS",
    "OPS",
    "SPELLINGS",
    "UNKNOWN",
    "Cost",
    "Op",
    "Param",
    "Signature",
    "bind",
    "cost",
    "infer",
    "is_tensor",
    "lookup",
    "measure",
    "nearest",
    "outputs_of",
]
