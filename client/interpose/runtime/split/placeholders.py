"""What a stub returns: a tensor whose numbers are asked for only when somebody needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import InternalError
from .. import nests

_FREE = frozenset(
    {
        *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__),  # type: ignore[attr-defined]
        *(Tensor.is_cuda.__get__, Tensor.layout.__get__, Tensor.is_meta.__get__),  # type: ignore[attr-defined]
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.is_complex),
        *(Tensor.__len__, Tensor.ndimension),
    }
)
"""What can be told without the numbers."""


class Source(Protocol):
    """Where a placeholder's numbers come from."""

    def value(self, turn: int) -> Tensor:
        """The numbers, made now if they weren't yet."""


class Placeholder(Tensor):
    """Stands for what a block returns, of known shape, dtype and device."""

    source: Source
    turn: int

    @staticmethod
    def __new__(cls, like: Tensor, dtype: torch.dtype, source: Source, turn: int) -> Placeholder:
        made: Placeholder = Tensor._make_wrapper_subclass(cls, like.shape, dtype=dtype, device=like.device)
        made.source = source
        made.turn = turn
        return made

    def __init__(self, like: Tensor, dtype: torch.dtype, source: Source, turn: int) -> None:
        """All is done where it is made."""

    def settled(self) -> Tensor:
        return self.source.value(self.turn)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*settled(args), **settled(dict(kwargs or {})))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*settled(args), **settled(dict(kwargs or {})))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Placeholder({tuple(self.shape)})"


class Withheld(Tensor):
    """Stands for what a block returns beside its hidden states, which stays where the block is."""

    path: str

    @staticmethod
    def __new__(cls, path: str) -> Withheld:
        made: Withheld = Tensor._make_wrapper_subclass(cls, (0,))
        made.path = path
        return made

    def __init__(self, path: str) -> None:
        """All is done where it is made."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise InternalError("what a block returns beside its hidden states stays on its shard")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise InternalError("what a block returns beside its hidden states stays on its shard")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Withheld({self.path})"


def settled(nest: Any) -> Any:
    """The nest with real tensors for placeholders; itself where it holds none."""
    if isinstance(nest, Placeholder):
        return nest.settled()
    if isinstance(nest, (Tensor, str, int, float)) or nest is None:
        return nest
    if type(nest) is tuple:
        found = tuple(settled(item) for item in nest)
        return nest if all(one is other for one, other in zip(found, nest, strict=True)) else found
    for path, tensor in nests.tensors(nest):
        if isinstance(tensor, Withheld):
            raise InternalError(f"what {tensor.path} returns beside its hidden states stays on its shard")
        if isinstance(tensor, Placeholder):
            nest = nests.put(nest, path, tensor.settled())
    return nest
