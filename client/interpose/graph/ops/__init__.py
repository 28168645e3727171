"""The closed table of tensor operations: what each takes, gives and costs. No torch here."""

from .binding import bind
from .declare import Op, Param, Signature
from .infer import Cost, cost, infer
from .kinds import UNKNOWN, is_spec
from .kinds import is_spec as is_tensor
from .spellings import INPLACE, SPELLINGS
from .table import OPS, lookup, outputs_of

__all__ = [
    "INPLACE",
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
    "is_spec",
    "is_tensor",
    "lookup",
    "outputs_of",
]
