"""Other dtypes of the same values."""

from __future__ import annotations

from ..values import TensorSpec
from .declare import Bound, Family

family = Family()

NAMED = {
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "bfloat16": "bfloat16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "char": "int8",
    "byte": "uint8",
    "bool": "bool",
}
"""Method of tensors -> the dtype it converts to."""


def _to(bound: Bound) -> TensorSpec:
    dtype = bound["dtype"].name if "dtype" in bound else bound["other"].dtype
    return TensorSpec(bound["input"].shape, dtype)


family.declare(
    """
    m to(input: tensor, dtype: dtype, non_blocking: bool = False, copy: bool = False)
    m to(input: tensor, other: tensor, non_blocking: bool = False, copy: bool = False)
    m type(input: tensor, dtype: dtype)
    m type_as(input: tensor, other: tensor)
    """,
    _to,
    view=True,
)
for _name, _dtype in NAMED.items():

    def _named(bound: Bound, dtype: str = _dtype) -> TensorSpec:
        return TensorSpec(bound["input"].shape, dtype)

    family.declare(f"m {_name}(input: tensor)", _named, view=True)
