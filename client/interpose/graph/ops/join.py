"""Several tensors into one, one tensor several times, padding."""

from __future__ import annotations

from ...errors import BadArgument, ShapeMismatch
from ..values import TensorSpec
from .declare import Bound, Family, Outputs
from .dtypes import promote, result_type
from .shapes import Shape, broadcast, dim_of, sizes, with_size
from .view import MAX_PIECES

family = Family()


def _common(tensors: tuple[TensorSpec, ...]) -> str:
    return result_type(*tensors)


def _cat(tensors: tuple[TensorSpec, ...], dim: int) -> TensorSpec:
    # torch passes over tensors of shape [0], whatever the others are.
    real = [spec for spec in tensors if spec.shape != (0,)] or [tensors[0]]
    shape = real[0].shape
    if not shape or any(not spec.shape for spec in tensors):
        raise ShapeMismatch("cat takes tensors with a dimension; stack() puts numbers together")
    at = dim_of(dim, len(shape))
    for spec in real[1:]:
        if len(spec.shape) != len(shape) or with_size(spec.shape, at, 0) != with_size(shape, at, 0):
            raise ShapeMismatch(f"cat: {list(shape)} and {list(spec.shape)} differ beside dim {dim}")
    return TensorSpec(with_size(shape, at, sum(spec.shape[at] for spec in real)), _common(tensors))


def _joined(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """Tensors of another dtype are converted first."""
    mixed = any(spec.dtype != outputs[0].dtype for spec in bound["tensors"])
    return outputs[0].numel, outputs[0].nbytes if mixed else 0


family.declare("t cat(tensors: tensors, dim: int = 0)", lambda bound: _cat(bound["tensors"], bound["dim"]), _joined)


def _stack(bound: Bound) -> TensorSpec:
    tensors = bound["tensors"]
    shape = tensors[0].shape
    if any(spec.shape != shape for spec in tensors):
        listed = ", ".join(str(list(spec.shape)) for spec in tensors[:8])
        raise ShapeMismatch(f"stack takes tensors of one shape, not {listed}")
    dim = dim_of(bound["dim"], len(shape) + 1)
    return TensorSpec((*shape[:dim], len(tensors), *shape[dim:]), _common(tensors))


family.declare("t stack(tensors: tensors, dim: int = 0)", _stack, _joined)


def _raised(tensors: tuple[TensorSpec, ...], shape: dict[int, tuple[int | None, ...]]) -> tuple[TensorSpec, ...]:
    """The tensors with too few dimensions given sizes of 1; None stands for the size they have."""
    raised = []
    for spec in tensors:
        form = shape.get(len(spec.shape))
        own = iter(spec.shape)
        new = spec.shape if form is None else tuple(next(own) if size is None else size for size in form)
        raised.append(TensorSpec(new, spec.dtype))
    return tuple(raised)


def _hstack(bound: Bound) -> TensorSpec:
    tensors = _raised(bound["tensors"], {0: (1,)})
    return _cat(tensors, 0 if len(tensors[0].shape) == 1 else 1)


def _vstack(bound: Bound) -> TensorSpec:
    return _cat(_raised(bound["tensors"], {0: (1, 1), 1: (1, None)}), 0)


def _dstack(bound: Bound) -> TensorSpec:
    return _cat(_raised(bound["tensors"], {0: (1, 1, 1), 1: (1, None, 1), 2: (None, None, 1)}), 2)


def _column_stack(bound: Bound) -> TensorSpec:
    return _cat(_raised(bound["tensors"], {0: (1, 1), 1: (None, 1)}), 1)


family.declare("t hstack(tensors: tensors)", _hstack, _joined)
family.declare("t vstack(tensors: tensors)\nt row_stack(tensors: tensors)", _vstack, _joined)
family.declare("t dstack(tensors: tensors)", _dstack, _joined)
family.declare("t column_stack(tensors: tensors)", _column_stack, _joined)


def _block_diag(bound: Bound) -> TensorSpec:
    tensors = _raised(bound["tensors"], {0: (1, 1), 1: (1, None)})
    if any(len(spec.shape) != 2 for spec in tensors):
        raise ShapeMismatch("block_diag takes tensors of up to 2 dimensions")
    dtype = tensors[0].dtype
    for spec in tensors[1:]:
        dtype = promote(dtype, spec.dtype)
    return TensorSpec((sum(s.shape[0] for s in tensors), sum(s.shape[1] for s in tensors)), dtype)


family.declare("t block_diag(*tensors: tensors)", _block_diag)


def _repeat(bound: Bound) -> TensorSpec:
    shape, times = bound["input"].shape, sizes(bound["repeats"], "number of repeats")
    if len(times) < len(shape):
        raise ShapeMismatch(f"repeat: {len(times)} numbers for the {len(shape)} dimensions of the tensor")
    return TensorSpec(_repeated(shape, times), bound["input"].dtype)


def _repeated(shape: Shape, times: Shape) -> Shape:
    ndim = max(len(shape), len(times))
    shape, times = (1,) * (ndim - len(shape)) + shape, (1,) * (ndim - len(times)) + times
    return tuple(size * count for size, count in zip(shape, times, strict=True))


def _tile(bound: Bound) -> TensorSpec:
    times = sizes(bound["dims"], "number of repeats")
    return TensorSpec(_repeated(bound["input"].shape, times), bound["input"].dtype)


family.declare("m repeat(input: tensor, *repeats: ints)", _repeat)
family.declare("tm tile(input: tensor, *dims: ints)", _tile)


def _repeat_interleave(bound: Bound) -> TensorSpec:
    spec, dim, times = bound["input"], bound["dim"], bound["repeats"]
    if times < 0:
        raise BadArgument(f"repeat_interleave: {times} isn't a number of repeats")
    if dim is None:
        return TensorSpec((spec.numel * times,), spec.dtype)
    at = dim_of(dim, len(spec.shape))
    shape = spec.shape or (1,)
    return TensorSpec(with_size(shape, at, shape[at] * times), spec.dtype)


family.declare(
    "tm repeat_interleave(input: tensor, repeats: int, dim: int? = None)",
    _repeat_interleave,
    lambda bound, outputs: (outputs[0].numel, outputs[0].nbytes + 16 * outputs[0].numel),
)

_WIDTHS = {"constant": (0, 99), "reflect": (1, 3), "replicate": (1, 3), "circular": (1, 3)}


def _pad(bound: Bound) -> TensorSpec:
    spec, pad, mode = bound["input"], bound["pad"], bound["mode"]
    shape = list(spec.shape)
    if len(pad) % 2 or len(pad) > 2 * len(shape):
        raise ShapeMismatch(f"pad takes two numbers for each of the last dims, not {list(pad)} for {shape}")
    count = len(pad) // 2
    low, high = _WIDTHS[mode]
    if mode != "constant" and not (low <= count <= high and len(shape) in (count + 1, count + 2)):
        raise ShapeMismatch(
            f"pad: mode {mode!r} pads the last {len(shape) - 2} or {len(shape) - 1} dims of 2D to 5D"
        )
    if mode != "constant" and not spec.numel:
        raise ShapeMismatch(f"pad: mode {mode!r} has nothing to repeat in a tensor of shape {shape}")
    for back in range(count):
        before, after = pad[2 * back], pad[2 * back + 1]
        size = shape[-1 - back]
        most = {"reflect": size - 1, "circular": size}.get(mode)
        if (most is not None and max(before, after) > most) or size + min(before, 0) + min(after, 0) < 0:
            raise ShapeMismatch(f"pad: {before} and {after} don't go with a size of {size} in mode {mode!r}")
        shape[-1 - back] = size + before + after
    if mode != "constant" and 0 in shape:
        raise ShapeMismatch(f"pad: nothing is left of {list(spec.shape)}")
    return TensorSpec(tuple(shape), spec.dtype)


family.declare(
    "f pad(input: tensor, pad: ints, mode: 'constant'|'reflect'|'replicate'|'circular' = 'constant', "
    "value: float? = None)",
    _pad,
)


def _meshgrid(bound: Bound) -> tuple[TensorSpec, ...]:
    tensors = bound["tensors"]
    if any(len(spec.shape) > 1 for spec in tensors):
        raise ShapeMismatch("meshgrid takes tensors of one dimension")
    if len(tensors) > MAX_PIECES:
        raise BadArgument("meshgrid: too many tensors")
    if any(spec.dtype != tensors[0].dtype for spec in tensors):
        raise BadArgument("meshgrid takes tensors of one dtype")
    shape = [spec.numel for spec in tensors]
    if bound["indexing"] == "xy" and len(shape) > 1:
        shape[:2] = shape[1::-1]
    return tuple(TensorSpec(tuple(shape), spec.dtype) for spec in tensors)


family.declare("t meshgrid(*tensors: tensors, indexing: 'ij'|'xy'? = None) -> *", _meshgrid)


def _broadcast_tensors(bound: Bound) -> tuple[TensorSpec, ...]:
    tensors = bound["tensors"]
    if len(tensors) > MAX_PIECES:
        raise BadArgument("broadcast_tensors: too many tensors")
    shape = broadcast(*(one.shape for one in tensors))
    return tuple(TensorSpec(shape, spec.dtype) for spec in tensors)


family.declare("t broadcast_tensors(*tensors: tensors) -> *", _broadcast_tensors)


def _cartesian_prod(bound: Bound) -> TensorSpec:
    tensors = bound["tensors"]
    if any(len(spec.shape) != 1 for spec in tensors):
        raise ShapeMismatch("cartesian_prod takes tensors of one dimension")
    if any(spec.dtype != tensors[0].dtype for spec in tensors):
        raise BadArgument("cartesian_prod takes tensors of one dtype")
    if len(tensors) == 1:
        return TensorSpec(tensors[0].shape, tensors[0].dtype)
    rows = 1
    for spec in tensors:
        rows *= spec.numel
    return TensorSpec((rows, len(tensors)), tensors[0].dtype)


def _twice(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    return 2 * sum(spec.numel for spec in outputs), sum(spec.nbytes for spec in outputs)


family.declare("t cartesian_prod(*tensors: tensors)", _cartesian_prod, _twice)
