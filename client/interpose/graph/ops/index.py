"""Elements picked by position: getitem, setitem, gather, scatter, masks, embedding, order."""

from __future__ import annotations

from typing import Any

from ...errors import BadArgument, ShapeMismatch
from ..values import TensorSpec
from .declare import Bound, Family, Outputs, Result, no_work
from .dtypes import need_integer
from .grammar import check_position, indexed
from .kinds import UNKNOWN, is_spec
from .shapes import Shape, broadcast, dim_of, dims_of, expandable, need_ndim, same, with_size, without

family = Family()


def _getitem(bound: Bound) -> Result:
    value, items = bound["input"], bound["index"]
    if isinstance(value, tuple):
        return _part(value, items)
    if not isinstance(value, TensorSpec) or _unknown_within(items):
        return UNKNOWN
    shape = indexed(value.shape, items)
    return UNKNOWN if shape is None else TensorSpec(shape, value.dtype)


def _part(values: tuple[Any, ...], items: tuple[Any, ...]) -> Result:
    """One of several tensors, or some of them."""
    (item,) = items if len(items) == 1 else (None,)
    if isinstance(item, slice) and not any(map(is_spec, (item.start, item.stop, item.step))):
        if item.step == 0:
            raise BadArgument("a slice's step is 0; it must be another integer")
        return values[item]
    if type(item) is not int:
        raise BadArgument("several tensors are indexed by one integer or slice: take a tensor first")
    check_position(item, len(values))
    part: Result = values[item]
    return part if isinstance(part, TensorSpec) else UNKNOWN


def _unknown_within(items: tuple[Any, ...]) -> bool:
    return any(is_spec(item) and not isinstance(item, TensorSpec) for item in items)


def _most(bound: Bound) -> Result:
    value, items = bound["input"], bound["index"]
    if isinstance(value, tuple):
        return _part(value, items)
    shape = indexed(value.shape, items, most=True)
    assert shape is not None
    return TensorSpec(shape, value.dtype)


def _pick_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """Masks and lists become positions: 8 bytes for each element of them and each dimension."""
    total = sum(spec.numel for spec in outputs)
    specs = [item for item in bound["index"] if isinstance(item, TensorSpec)]
    return 2 * total, sum(16 * spec.numel * max(len(spec.shape), 1) for spec in specs)


def _getitem_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """Integers and slices only look; so does taking one of several tensors."""
    if isinstance(bound["input"], tuple) or not any(
        isinstance(item, (TensorSpec, list)) for item in bound["index"]
    ):
        return no_work(bound, outputs)
    return _pick_work(bound, outputs)


family.declare(
    "m getitem(input: tensor|tensors, *index: index)", _getitem, _getitem_work, bound=_most, view=True, partial=True
)


def _setitem(bound: Bound) -> Result:
    target, items, value = bound["input"], bound["index"], bound["value"]
    if not isinstance(target, TensorSpec):
        return UNKNOWN
    if _unknown_within(items):
        return target
    region = indexed(target.shape, items)
    if region is not None and isinstance(value, TensorSpec):
        shape = value.shape
        # torch drops leading sizes of 1 that the region doesn't have.
        while len(shape) > len(region) and shape[0] == 1:
            shape = shape[1:]
        expandable(shape, region, "a value")
    return target


family.declare("m setitem(input: tensor, index: index, value: tensor|number)", _setitem, _pick_work, partial=True)


def _lifted(shape: Shape) -> Shape:
    """A shape with at least one dimension, as torch takes it along a dim."""
    return shape or (1,)


def _along(bound: Bound, name: str = "index") -> tuple[Shape, Shape, int]:
    """Shapes of the input and of the index, and the dim; they have as many dimensions."""
    target, index = _lifted(bound["input"].shape), _lifted(bound[name].shape)
    _need_positions(bound[name])
    if len(target) != len(index):
        raise ShapeMismatch(
            f"index of shape {list(index)} and input of shape {list(target)}: as many dims are needed"
        )
    return target, index, dim_of(bound["dim"], len(target))


def _need_positions(spec: TensorSpec) -> None:
    if spec.dtype not in ("int64", "int32"):
        need_integer(spec.dtype, "an index")
        raise BadArgument(f"an index is int64, not {spec.dtype}; convert it: index.long()")


def _within(index: Shape, shape: Shape, skip: int | None, what: str) -> None:
    for dim, (size, most) in enumerate(zip(index, shape, strict=True)):
        if dim != skip and size > most:
            raise ShapeMismatch(
                f"index of shape {list(index)} reaches beyond the {what}, {list(shape)}, in dim {dim}"
            )


def _gather(bound: Bound) -> TensorSpec:
    target, index, dim = _along(bound)
    if bound["index"].numel:
        _within(index, target, dim, "input")
    return TensorSpec(bound["index"].shape, bound["input"].dtype)


family.declare("tm gather(input: tensor, dim: int, index: tensor, sparse_grad: bool = False)", _gather)


def _scatter(bound: Bound) -> TensorSpec:
    target, index, dim = _along(bound)
    source = bound["src"]
    if bound["index"].numel:
        _within(index, target, dim, "input")
        if isinstance(source, TensorSpec):
            same(len(_lifted(source.shape)), len(index), "dimensions of the source against the index")
            _within(index, _lifted(source.shape), None, "source")
    if isinstance(source, TensorSpec) and source.dtype != bound["input"].dtype:
        raise BadArgument(f"a source of {source.dtype} doesn't go into {bound['input'].dtype}; convert it")
    spec: TensorSpec = bound["input"]
    return spec


def _scatter_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    return outputs[0].numel + 4 * bound["index"].numel, 8 * bound["index"].numel


family.declare(
    """
    tm scatter(input: tensor, dim: int, index: tensor, src: tensor|number)
    tm scatter_add(input: tensor, dim: int, index: tensor, src: tensor)
    """,
    _scatter,
    _scatter_work,
)
family.declare(
    "tm scatter_reduce(input: tensor, dim: int, index: tensor, src: tensor, "
    "reduce: 'sum'|'prod'|'mean'|'amax'|'amin', include_self: bool = True)",
    _scatter,
    lambda bound, outputs: (
        4 * sum(_scatter_work(bound, outputs)),
        4 * outputs[0].nbytes + 8 * bound["index"].numel,
    ),
)


def _line(spec: TensorSpec) -> int:
    """The length of an index of one dimension."""
    _need_positions(spec)
    if len(spec.shape) > 1:
        raise ShapeMismatch(f"the index has one dimension here, not the shape {list(spec.shape)}")
    return spec.numel


def _index_select(bound: Bound) -> TensorSpec:
    spec = bound["input"]
    length, dim = _line(bound["index"]), dim_of(bound["dim"], len(spec.shape))
    if not spec.shape:
        same(length, 1, "one value, so one index")
        return TensorSpec((), spec.dtype)
    return TensorSpec(with_size(spec.shape, dim, length), spec.dtype)


family.declare("tm index_select(input: tensor, dim: int, index: tensor)", _index_select)


def _index_write(bound: Bound) -> TensorSpec:
    """Slices along a dim that another tensor, or a number, goes into."""
    spec, source = bound["input"], bound.get("source")
    length, dim = _line(bound["index"]), dim_of(bound["dim"], len(spec.shape))
    if source is not None:
        wanted = with_size(spec.shape, dim, length) if spec.shape else ()
        if source.shape != wanted:
            raise ShapeMismatch(f"the source has shape {list(source.shape)}; {list(wanted)} fits")
        if source.dtype != spec.dtype:
            raise BadArgument(f"a source of {source.dtype} doesn't go into {spec.dtype}; convert it")
    elif isinstance(bound["value"], TensorSpec) and bound["value"].shape:
        raise ShapeMismatch("index_fill takes a number or a tensor without dimensions")
    assert isinstance(spec, TensorSpec)
    return spec


family.declare(
    """
    tm index_add(input: tensor, dim: int, index: tensor, source: tensor, alpha: number = 1)
    tm index_copy(input: tensor, dim: int, index: tensor, source: tensor)
    tm index_fill(input: tensor, dim: int, index: tensor, value: tensor|number)
    """,
    _index_write,
    _scatter_work,
)


def _take_along(bound: Bound) -> TensorSpec:
    spec, indices = bound["input"], bound["indices"]
    _need_positions(indices)
    if bound["dim"] is None:
        return TensorSpec((indices.numel,), spec.dtype)
    same(len(spec.shape), len(indices.shape), "take_along_dim: dimensions of input and indices")
    if not spec.shape:
        raise ShapeMismatch("take_along_dim takes a tensor with a dimension")
    dim = dim_of(bound["dim"], len(spec.shape))
    one = broadcast(with_size(spec.shape, dim, 1), with_size(indices.shape, dim, 1))
    return TensorSpec(with_size(one, dim, indices.shape[dim]), spec.dtype)


family.declare(
    "tm take_along_dim(input: tensor, indices: tensor, dim: int? = None)",
    _take_along,
    lambda bound, outputs: (2 * outputs[0].numel, 8 * outputs[0].numel),
)


def _take(bound: Bound) -> TensorSpec:
    _need_positions(bound["index"])
    return TensorSpec(bound["index"].shape, bound["input"].dtype)


family.declare("tm take(input: tensor, index: tensor)", _take)


def _mask(bound: Bound) -> TensorSpec:
    mask = bound["mask"]
    if mask.dtype != "bool":
        raise BadArgument(f"a mask is bool, not {mask.dtype}; compare first: x != 0")
    if isinstance(bound.get("value"), TensorSpec) and bound["value"].shape:
        raise ShapeMismatch("masked_fill takes a number or a tensor without dimensions; where() takes others")
    return TensorSpec(broadcast(bound["input"].shape, mask.shape), bound["input"].dtype)


def _mask_most(bound: Bound) -> TensorSpec:
    spec = _mask(bound)
    return TensorSpec((spec.numel,), spec.dtype)


def _select_by_mask(bound: Bound) -> Result:
    _mask(bound)
    return UNKNOWN


family.declare("tm masked_fill(input: tensor, mask: tensor, value: tensor|number)", _mask)
family.declare(
    "tm masked_select(input: tensor, mask: tensor)",
    _select_by_mask,
    lambda bound, outputs: (4 * outputs[0].numel, 9 * outputs[0].numel),
    bound=_mask_most,
)
family.declare(
    "tm nonzero(input: tensor)\nt argwhere(input: tensor)",
    lambda _: UNKNOWN,
    lambda bound, outputs: (4 * outputs[0].numel, outputs[0].nbytes),
    bound=lambda bound: TensorSpec((bound["input"].numel, len(bound["input"].shape)), "int64"),
)


def _embedding(bound: Bound) -> TensorSpec:
    weight, ids = bound["weight"], bound["input"]
    need_ndim(weight.shape, 2, "embedding's weight")
    _need_positions(ids)
    if bound["padding_idx"] is not None:
        check_position(bound["padding_idx"], weight.shape[0], "padding_idx")
    return TensorSpec((*ids.shape, weight.shape[1]), weight.dtype)


family.declare("f embedding(input: tensor, weight: tensor, padding_idx: int? = None)", _embedding)


def _roll(bound: Bound) -> TensorSpec:
    spec, shifts, dims = bound["input"], bound["shifts"], bound["dims"]
    if dims:
        same(len(shifts), len(dims), "roll: shifts against dims")
        if not spec.shape:
            raise ShapeMismatch("roll: there is no dim to roll")
        for dim in dims:
            dim_of(dim, len(spec.shape))
    elif len(shifts) != 1:
        raise BadArgument("roll: several shifts need as many dims")
    assert isinstance(spec, TensorSpec)
    return spec


family.declare(
    "tm roll(input: tensor, shifts: ints, dims: ints? = None)",
    _roll,
    lambda bound, outputs: (outputs[0].numel * len(bound["shifts"]), outputs[0].nbytes),
)


def _flip(bound: Bound) -> TensorSpec:
    spec = bound["input"]
    dims_of(bound["dims"], len(spec.shape))
    assert isinstance(spec, TensorSpec)
    return spec


family.declare("tm flip(input: tensor, *dims: ints)", _flip)
for _name, _dim in (("flipud", 0), ("fliplr", 1)):

    def _flipped(bound: Bound, dim: int = _dim) -> TensorSpec:
        if len(bound["input"].shape) <= dim:
            raise ShapeMismatch(f"there is no dim {dim} to flip")
        return _flip({**bound, "dims": (dim,)})

    family.declare(f"tm {_name}(input: tensor)", _flipped)


def _rot90(bound: Bound) -> TensorSpec:
    spec = bound["input"]
    if len(bound["dims"]) != 2:
        raise BadArgument("rot90 takes two dims")
    one, other = dims_of(bound["dims"], len(spec.shape))
    if bound["k"] % 2 == 0:
        return TensorSpec(spec.shape, spec.dtype)
    shape = list(spec.shape)
    shape[one], shape[other] = shape[other], shape[one]
    return TensorSpec(tuple(shape), spec.dtype)


family.declare("tm rot90(input: tensor, k: int, dims: ints)", _rot90)


def _region_scatter(bound: Bound) -> TensorSpec:
    spec, dim = bound["input"], dim_of(bound["dim"], len(bound["input"].shape))
    if "index" in bound:
        check_position(bound["index"], spec.shape[dim])
        wanted = without(spec.shape, (dim,))
    else:
        if bound["step"] <= 0:
            raise BadArgument("slice_scatter: the step must be positive")
        span = slice(bound["start"], bound["end"], bound["step"]).indices(spec.shape[dim])
        wanted = with_size(spec.shape, dim, len(range(*span)))
    if bound["src"].shape != wanted:
        raise ShapeMismatch(f"the source has shape {list(bound['src'].shape)}; {list(wanted)} fits")
    assert isinstance(spec, TensorSpec)
    return spec


family.declare(
    """
    tm select_scatter(input: tensor, src: tensor, dim: int, index: int)
    tm slice_scatter(input: tensor, src: tensor, dim: int = 0, start: int? = None, end: int? = None, step: int = 1)
    """,
    _region_scatter,
)
