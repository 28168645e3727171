"""Inputs of a module as its owner gives them: nests of tensors and of anything else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import BadArgument

Given: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional arguments, and those by keyword."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def check(given: Given) -> None:
    """Raises BadArgument for values that are still to come: a module runs on real ones."""
    if any(getattr(type(leaf), "_interpose_deferred", False) for leaf in pytree.tree_leaves(given)):
        raise BadArgument(
            "a module is run on real inputs; a value that is still to come can be written where it goes: "
            "model.input[:] = value"
        )


def signature(given: Given, rows: int | None) -> Any:
    """What decides, with the module itself, how its forward runs; None where that can't be told.

    Args:
        rows: a dimension whose size doesn't count; None if all sizes do.
    """
    leaves, structure = pytree.tree_flatten(given)
    if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return None
    return rows, repr(structure), tuple(_kind(leaf, rows) for leaf in leaves)


def _kind(leaf: Any, rows: int | None) -> Any:
    if not isinstance(leaf, Tensor):
        return type(leaf), repr(leaf)
    sizes = tuple(-1 if dim == rows else size for dim, size in enumerate(leaf.shape))
    return Tensor, sizes, leaf.dtype, leaf.device


def copied(given: Given) -> Given:
    """The same with memory of its own, whatever it is made of: a module may change what it is given.

    Raises:
        BadArgument: something in it can't be copied.
    """
    leaves = pytree.tree_leaves(given)
    # Whoever draws from a generator moves it on, and it knows no deepcopy.
    memo: dict[int, Any] = {id(leaf): leaf.clone_state() for leaf in leaves if isinstance(leaf, torch.Generator)}
    try:
        with _Plainly():
            args, kwargs = copy.deepcopy(given, memo)
    except Exception as error:
        raise BadArgument(
            f"a module is first tried on a copy of its inputs, and these can't be copied: {error}"
        ) from error
    return args, kwargs


class _Plainly(TorchFunctionMode):
    """Tensors are copied without the history of how they were computed, with which torch copies none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())


def count(given: Given, rows: int) -> int:
    """How many rows its tensors have, in the dimension `rows`; those without that dimension are for all rows.

    Raises:
        BadArgument: they differ, or there are none.
    """
    sizes = {
        leaf.shape[rows] for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and _has(leaf, rows)
    }
    if len(sizes) != 1 or sizes == {0}:
        found = " and ".join(map(str, sorted(sizes))) or "no rows"
        raise BadArgument(
            f"prompts that share a forward have rows in dimension {rows} of every tensor, equally many; these have "
            f"{found}. Trace them one by one, in a session"
        )
    return int(sizes.pop())


def resized(given: Given, rows: int, size: int) -> Given:
    """The same with another number of rows; those that are added are others, turned around in what they hold."""

    def change(tensor: Tensor) -> Tensor:
        if not _has(tensor, rows):
            return tensor
        within = [dim for dim in range(tensor.ndim) if dim != rows]
        more = torch.arange(max(size - tensor.shape[rows], 0), device=tensor.device) % tensor.shape[rows]
        return torch.cat([tensor, tensor.flip(within).index_select(rows, more)], rows)

    return _changed(given, change)


def joined(inputs: Sequence[Given], rows: int) -> Given:
    """One forward's arguments for several prompts; a single prompt's as they are, cut off from how they were made.

    Raises:
        BadArgument: they differ in more than the rows of their tensors.
    """
    if len(inputs) == 1:
        tensors = (leaf for leaf in pytree.tree_leaves(inputs[0]) if isinstance(leaf, Tensor))
        return _changed(inputs[0], Tensor.detach) if any(t.requires_grad for t in tensors) else inputs[0]
    flat = [pytree.tree_flatten(given) for given in inputs]
    if any(structure != flat[0][1] for _, structure in flat):
        raise BadArgument("prompts that share a forward are given alike: the same arguments in the same form")
    together = [_together(parts, rows) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
    args, kwargs = pytree.tree_unflatten(together, flat[0][1])
    return args, kwargs


def _together(parts: Sequence[Any], rows: int) -> Any:
    first = parts[0]
    if isinstance(first, Tensor) and _has(first, rows):
        return torch.cat([part.detach() for part in parts], rows)
    same = all(
        torch.equal(first, part) if isinstance(first, Tensor) else first is part or first == part for part in parts
    )
    if not same:
        raise BadArgument("prompts that share a forward differ only in tensors with rows; trace these in a session")
    return first


def _has(tensor: Tensor, rows: int) -> bool:
    return tensor.ndim > rows


def _changed(given: Given, change: Callable[[Tensor], Tensor]) -> Given:
    args, kwargs = pytree.tree_map_only(Tensor, change, given)
    return args, kwargs
