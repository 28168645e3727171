"""Another look at the same elements: sizes, order of dimensions, parts; and the triangles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from ...errors import BadArgument, IndexOutOfRange, ShapeMismatch
from ..values import TensorSpec
from .declare import Bound, Family, Outputs, Rule, no_work
from .shapes import Shape, dim_of, dims_of, fill_in, need_ndim, sizes, with_size, without

family = Family()


def _reshaped(shape_of: Callable[[Bound, Shape], Shape]) -> Rule:
    """A rule: the input's dtype in the shape that `shape_of(arguments, input shape)` gives."""

    def rule(bound: Bound) -> TensorSpec:
        spec = bound["input"]
        return TensorSpec(shape_of(bound, spec.shape), spec.dtype)

    return rule


def _view(lines: str, shape_of: Callable[[Bound, Shape], Shape]) -> None:
    family.declare(lines, _reshaped(shape_of), no_work, view=True)


def may_copy(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """A view where the layout in memory allows, else a copy."""
    return sum(spec.numel for spec in outputs), 0


def _numel(shape: Shape) -> int:
    return TensorSpec(shape, "bool").numel


def _fill(bound: Bound, shape: Shape) -> Shape:
    return fill_in(bound["shape"], _numel(shape))


_view("m view(input: tensor, *shape: ints)", _fill)
family.declare("tm reshape(input: tensor, *shape: ints)", _reshaped(_fill), may_copy, view=True)


def _fill_as(bound: Bound, shape: Shape) -> Shape:
    return fill_in(bound["other"].shape, _numel(shape))


_view("m view_as(input: tensor, other: tensor)", _fill_as)
family.declare("m reshape_as(input: tensor, other: tensor)", _reshaped(_fill_as), may_copy, view=True)


def _flatten(bound: Bound, shape: Shape) -> Shape:
    start, end = (dim_of(bound[name], len(shape)) for name in ("start_dim", "end_dim"))
    if not shape:
        return (1,)
    if start > end:
        raise BadArgument(f"flatten: start_dim {bound['start_dim']} comes after end_dim {bound['end_dim']}")
    return (*shape[:start], _numel(shape[start : end + 1]), *shape[end + 1 :])


family.declare(
    "tm flatten(input: tensor, start_dim: int = 0, end_dim: int = -1)", _reshaped(_flatten), may_copy, view=True
)
family.declare("tm ravel(input: tensor)", _reshaped(lambda _, shape: (_numel(shape),)), may_copy, view=True)


def _unflatten(bound: Bound, shape: Shape) -> Shape:
    if not shape:
        raise ShapeMismatch("unflatten takes a tensor with a dimension")
    dim = dim_of(bound["dim"], len(shape))
    return (*shape[:dim], *fill_in(bound["sizes"], shape[dim]), *shape[dim + 1 :])


_view("tm unflatten(input: tensor, dim: int, *sizes: ints)", _unflatten)


def _swap(shape: Shape, one: int, other: int) -> Shape:
    order = list(shape)
    one, other = dim_of(one, len(shape)), dim_of(other, len(shape))
    if order:
        order[one], order[other] = order[other], order[one]
    return tuple(order)


_view(
    "tm transpose(input: tensor, dim0: int, dim1: int)\ntm swapdims(input: tensor, dim0: int, dim1: int)",
    lambda bound, shape: _swap(shape, bound["dim0"], bound["dim1"]),
)
_view(
    "tm swapaxes(input: tensor, axis0: int, axis1: int)",
    lambda bound, shape: _swap(shape, bound["axis0"], bound["axis1"]),
)


def _t(bound: Bound, shape: Shape) -> Shape:
    if len(shape) > 2:
        raise ShapeMismatch(f"t takes a tensor of up to 2 dimensions, not {list(shape)}; try transpose or mT")
    return shape[::-1]


def _mt(bound: Bound, shape: Shape) -> Shape:
    if len(shape) < 2:
        raise ShapeMismatch(f"mT takes a tensor of at least 2 dimensions, not {list(shape)}")
    return _swap(shape, -2, -1)


_view("tm t(input: tensor)", _t)
_view("m T(input: tensor)", _t)
_view("m mT(input: tensor)", _mt)


def _permute(bound: Bound, shape: Shape) -> Shape:
    dims = dims_of(bound["dims"], len(shape))
    if len(dims) != len(shape):
        raise ShapeMismatch(f"permute: {len(dims)} dims named, the tensor has {len(shape)}")
    return tuple(shape[dim] for dim in dims)


_view("tm permute(input: tensor, *dims: ints)", _permute)


def _movedim(bound: Bound, shape: Shape) -> Shape:
    source, target = dims_of(bound["source"], len(shape)), dims_of(bound["destination"], len(shape))
    if len(source) != len(target):
        raise BadArgument("movedim: as many destinations as sources are needed")
    taken = dict(zip(target, source, strict=True))
    rest = iter(dim for dim in range(len(shape)) if dim not in source)
    return tuple(shape[taken[at] if at in taken else next(rest)] for at in range(len(shape)))


_view(
    """
    tm movedim(input: tensor, source: ints, destination: ints)
    tm moveaxis(input: tensor, source: ints, destination: ints)
    """,
    _movedim,
)


def _squeeze(bound: Bound, shape: Shape) -> Shape:
    dims = range(len(shape)) if bound["dim"] is None else dims_of(bound["dim"], len(shape))
    return without(shape, [dim for dim in dims if shape and shape[dim] == 1])


_view("tm squeeze(input: tensor, dim: ints? = None)", _squeeze)


def _unsqueeze(bound: Bound, shape: Shape) -> Shape:
    dim = dim_of(bound["dim"], len(shape) + 1)
    return (*shape[:dim], 1, *shape[dim:])


_view("tm unsqueeze(input: tensor, dim: int)", _unsqueeze)


def _expand(shape: Shape, wanted: Sequence[int]) -> Shape:
    extra = len(wanted) - len(shape)
    if extra < 0:
        raise ShapeMismatch(f"{list(shape)} doesn't expand to the fewer dimensions of {list(wanted)}")
    result = []
    for at, size in enumerate(wanted):
        have = shape[at - extra] if at >= extra else None
        if size == -1 and have is not None:
            size = have
        if size < 0 or (have is not None and have not in (1, size)):
            raise ShapeMismatch(f"{list(shape)} doesn't expand to {list(wanted)}: dim {at}")
        result.append(size)
    return tuple(result)


_view(
    "m expand(input: tensor, *size: ints)\ntm broadcast_to(input: tensor, size: ints)",
    lambda bound, shape: _expand(shape, bound["size"]),
)
_view("m expand_as(input: tensor, other: tensor)", lambda bound, shape: _expand(shape, bound["other"].shape))


def _narrow(bound: Bound, shape: Shape) -> Shape:
    dim = _real_dim(bound, shape, "narrow")
    start, length, size = bound["start"], bound["length"], shape[dim]
    first = start + size if start < 0 else start
    if length < 0 or not 0 <= first <= size or first + length > size:
        raise IndexOutOfRange(f"narrow: {length} from {start} on, in dim {bound['dim']} of size {size}")
    return with_size(shape, dim, length)


_view("tm narrow(input: tensor, dim: int, start: int, length: int)", _narrow)


def _real_dim(bound: Bound, shape: Shape, what: str) -> int:
    if not shape:
        raise ShapeMismatch(f"{what} takes a tensor with a dimension")
    return dim_of(bound["dim"], len(shape))


def _select(bound: Bound, shape: Shape) -> Shape:
    dim = _real_dim(bound, shape, "select")
    if not -shape[dim] <= bound["index"] < shape[dim]:
        raise IndexOutOfRange(
            f"select: index {bound['index']} in dim {bound['dim']} of size {shape[dim]}",
            details={"index": bound["index"], "size": shape[dim]},
        )
    return without(shape, (dim,))


_view("tm select(input: tensor, dim: int, index: int)", _select)


def _diagonal(bound: Bound, shape: Shape) -> Shape:
    if len(shape) < 2:
        raise ShapeMismatch(f"diagonal takes a tensor of at least 2 dimensions, not {list(shape)}")
    one, other = dims_of((bound["dim1"], bound["dim2"]), len(shape))
    offset = bound["offset"]
    length = min(shape[one] + min(offset, 0), shape[other] - max(offset, 0))
    return (*without(shape, (one, other)), max(length, 0))


_view("tm diagonal(input: tensor, offset: int = 0, dim1: int = 0, dim2: int = 1)", _diagonal)


def _unfold(bound: Bound, shape: Shape) -> Shape:
    size, step = bound["size"], bound["step"]
    dim = dim_of(bound["dimension"], len(shape))
    have = shape[dim] if shape else 1
    if size < 0 or size > have or step <= 0:
        raise BadArgument(f"unfold: windows of {size} every {step} don't fit a dim of size {have}")
    if not shape:
        return (size,)
    return (*with_size(shape, dim, (have - size) // step + 1), size)


_view("m unfold(input: tensor, dimension: int, size: int, step: int)", _unfold)


def _atleast(ndim: int) -> Callable[[Bound, Shape], Shape]:
    def shape_of(_: Bound, shape: Shape) -> Shape:
        if len(shape) >= ndim:
            return shape
        if ndim == 3:
            return {0: (1, 1, 1), 1: (1, *shape, 1), 2: (*shape, 1)}[len(shape)]
        return (1,) * (ndim - len(shape)) + shape

    return shape_of


for _ndim in (1, 2, 3):
    _view(f"t atleast_{_ndim}d(input: tensor)", _atleast(_ndim))

_view("tm detach(input: tensor)\nm contiguous(input: tensor)\nm cpu(input: tensor)", lambda _, shape: shape)

# What `contiguous` gave of a value that was written since. It fails where that was a copy, with the old value.
_view("- still_contiguous(input: tensor)", lambda _, shape: shape)
family.declare("tm clone(input: tensor)", _reshaped(lambda _, shape: shape))


def pieces(spec: TensorSpec, dim: int, lengths: Sequence[int]) -> tuple[TensorSpec, ...]:
    """The tensor cut along a dim."""
    return tuple(TensorSpec(with_size(spec.shape, dim, length), spec.dtype) for length in lengths)


def _even(size: int, step: int) -> list[int]:
    return [min(step, size - start) for start in range(0, size, step)] or [0]


MAX_PIECES = 4096
"""Most tensors one operation may give."""


def _count(count: int, what: str) -> None:
    if count > MAX_PIECES:
        raise BadArgument(f"{what} would give {count} tensors; {MAX_PIECES} is the most")


def _chunk(bound: Bound) -> tuple[TensorSpec, ...]:
    spec = bound["input"]
    dim = _real_dim(bound, spec.shape, "chunk")
    if bound["chunks"] <= 0:
        raise BadArgument(f"chunk: {bound['chunks']} isn't a number of chunks")
    size = spec.shape[dim]
    _count(min(bound["chunks"], size) if size else bound["chunks"], "chunk")
    if not size:
        return pieces(spec, dim, [0] * bound["chunks"])
    return pieces(spec, dim, _even(size, -(-size // bound["chunks"])))


def _split(bound: Bound) -> tuple[TensorSpec, ...]:
    spec, step = bound["tensor"], bound["split_size_or_sections"]
    dim = _real_dim(bound, spec.shape, "split")
    size = spec.shape[dim]
    if isinstance(step, int):
        if step < 0 or (step == 0 and size):
            raise BadArgument(f"split: {step} isn't a size of pieces")
        _count(size // max(step, 1), "split")
        return pieces(spec, dim, _even(size, step) if step else [0])
    if sum(sizes(step)) != size:
        raise ShapeMismatch(f"split: sizes {list(step)} add up to {sum(step)}, dim {bound['dim']} has {size}")
    _count(len(step), "split")
    return pieces(spec, dim, step)


def _tensor_split(bound: Bound) -> tuple[TensorSpec, ...]:
    spec, where = bound["input"], bound["indices_or_sections"]
    dim = _real_dim(bound, spec.shape, "tensor_split")
    size = spec.shape[dim]
    if isinstance(where, int):
        if where <= 0:
            raise BadArgument(f"tensor_split: {where} isn't a number of pieces")
        _count(where, "tensor_split")
        return pieces(spec, dim, [size // where + (at < size % where) for at in range(where)])
    _count(len(where) + 1, "tensor_split")
    cuts = [0, *where, size]
    spans = [slice(start, end).indices(size) for start, end in pairwise(cuts)]
    return pieces(spec, dim, [max(end - start, 0) for start, end, _ in spans])


def _unbind(bound: Bound) -> tuple[TensorSpec, ...]:
    spec = bound["input"]
    dim = _real_dim(bound, spec.shape, "unbind")
    _count(spec.shape[dim], "unbind")
    each = TensorSpec(without(spec.shape, (dim,)), spec.dtype)
    return tuple([each] * spec.shape[dim])


family.declare("tm chunk(input: tensor, chunks: int, dim: int = 0) -> *", _chunk, no_work, view=True)
family.declare(
    "tm split(tensor: tensor, split_size_or_sections: int|ints, dim: int = 0) -> *", _split, no_work, view=True
)
family.declare(
    "tm tensor_split(input: tensor, indices_or_sections: int|ints, dim: int = 0) -> *",
    _tensor_split,
    no_work,
    view=True,
)
family.declare("tm unbind(input: tensor, dim: int = 0) -> *", _unbind, no_work, view=True)


def _triangle(bound: Bound, shape: Shape) -> Shape:
    if len(shape) < 2:
        raise ShapeMismatch(f"a triangle takes a tensor of at least 2 dimensions, not {list(shape)}")
    return shape


family.declare(
    "tm tril(input: tensor, diagonal: int = 0)\ntm triu(input: tensor, diagonal: int = 0)", _reshaped(_triangle)
)


def _diag(bound: Bound, shape: Shape) -> Shape:
    offset = bound["diagonal"]
    if len(shape) == 1:
        return (shape[0] + abs(offset),) * 2
    need_ndim(shape, 2, "diag")
    rows, columns = shape
    if not -rows <= offset <= columns:
        raise IndexOutOfRange(f"diag: diagonal {offset} of a tensor of shape {list(shape)}")
    return (max(min(rows + min(offset, 0), columns - max(offset, 0)), 0),)


family.declare("tm diag(input: tensor, diagonal: int = 0)", _reshaped(_diag))


def _diag_embed(bound: Bound, shape: Shape) -> Shape:
    if not shape:
        raise ShapeMismatch("diag_embed takes a tensor with a dimension")
    size = shape[-1] + abs(bound["offset"])
    rest = list(shape[:-1])
    for dim in sorted(dims_of((bound["dim1"], bound["dim2"]), len(shape) + 1)):
        rest.insert(dim, size)
    return tuple(rest)


family.declare(
    "tm diag_embed(input: tensor, offset: int = 0, dim1: int = -2, dim2: int = -1)", _reshaped(_diag_embed)
)
