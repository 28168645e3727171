"""What an operation gives and takes, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ShapeMismatch
from ..values import INT_MAX, Ref, TensorSpec
from .binding import bind
from .declare import Bound, Op, Result
from .kinds import UNKNOWN, Unknown
from .table import lookup

_SLACK = 1 << 12
"""Bytes an allocator may round one tensor up by, and small temporaries."""


MAX_DIMS = 64
"""Most dimensions of a tensor, as in torch's own kernels."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Upper bounds on one operation.

    Attributes:
        out_bytes: of all its outputs, as a save would carry them.
        peak_bytes: memory it allocates while it runs, outputs included; 0 for a pure view.
        flops: floating-point operations, or as much other work.
    """

    out_bytes: int
    peak_bytes: int
    flops: int

    @property
    def kept_bytes(self) -> int:
        """New memory its outputs hold: nothing for a pure view."""
        return self.out_bytes if self.peak_bytes else 0


def infer(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
    """The outputs of an operation on arguments with TensorSpec or UNKNOWN in place of tensors.

    UNKNOWN if they depend on values, or on an unknown input.

    Raises:
        UnknownOp, BadArgument: it can't be called so.
        ShapeMismatch, IndexOutOfRange: torch would fail on these shapes.
    """
    op = lookup(name)
    bound = bind(op, args, kwargs)
    if not op.partial and any(map(_has_unknown, bound.values())):
        return UNKNOWN
    return _ruled(op, bound)


def _ruled(op: Op, bound: Bound) -> Result:
    """What the op's rule says, if a machine could count it."""
    result = op.rule(bound)
    for spec in (result,) if isinstance(result, TensorSpec) else result if isinstance(result, tuple) else ():
        if len(spec.shape) > MAX_DIMS or max(spec.shape, default=0) > INT_MAX:
            raise ShapeMismatch(f"{op.name} would give a tensor of {len(spec.shape)} dimensions, or beyond 64 bits")
    return result


def _has_unknown(value: Any) -> bool:
    if isinstance(value, (Unknown, Ref)):
        return True
    if isinstance(value, slice):
        return any(map(_has_unknown, (value.start, value.stop, value.step)))
    return isinstance(value, (list, tuple)) and any(map(_has_unknown, value))


def cost(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Cost | None:
    """Bounds on what the operation takes; None only if an input is unknown.

    What a slice with computed ends selects counts as the whole dimension. Raises as `infer` does.
    """
    return measure(name, args, kwargs)[1]


def measure(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Result, Cost | None]:
    """`infer` and `cost` in one go."""
    op = lookup(name)
    bound = bind(op, args, kwargs)
    unknown = any(map(_has_unknown, bound.values()))
    result = _ruled(op, bound) if op.partial or not unknown else UNKNOWN
    if unknown:
        known = {name: _known_slices(value) for name, value in bound.items()}
        return result, None if any(map(_has_unknown, known.values())) else _cost(op, known, _ruled(op, known))
    return result, _cost(op, bound, result)


def _cost(op: Op, bound: Bound, result: Result) -> Cost:
    if isinstance(result, Unknown):
        assert op.bound is not None, f"{op.name} has no bound"
        result = op.bound({name: _known_slices(value) for name, value in bound.items()})
    assert not isinstance(result, Unknown)
    outputs = (result,) if isinstance(result, TensorSpec) else result
    flops, held = op.work(bound, outputs)
    out_bytes = sum(spec.nbytes for spec in outputs)
    peak = out_bytes + held
    return Cost(out_bytes, peak + _SLACK if peak > 0 else 0, flops)


def _known_slices(value: Any) -> Any:
    """Index items with slices that take everything where an end is a tensor."""
    if not isinstance(value, tuple):
        return value
    return tuple(
        slice(None, None, item.step) if isinstance(item, slice) and _has_unknown_end(item) else item
        for item in value
    )


def _has_unknown_end(item: slice) -> bool:
    return any(isinstance(end, (TensorSpec, Ref, Unknown)) for end in (item.start, item.stop))
