"""The torch face of deferred values: tensors on the meta device until the block has run, real ones after.

The only torch code outside `runtime`. A deferred tensor is a `torch.Tensor` subclass, so functions of torch hand
themselves over to it; when its value comes, the real tensor's content is swapped into the same Python object.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from ..errors import BadArgument, UnknownOp
from ..graph import ops
from ..graph.values import TensorSpec
from .bases import Base, View
from .deferred import Deferred, in_place
from .outside import is_deferred
from .recorder import Recorder
from .torch_names import function_table

_FUNCTIONS = function_table()


DEVICE = torch.device("cpu")
"""Where values are for the user's code, wherever the model is."""


def named_dtype(name: str) -> torch.dtype:
    """torch's dtype of a name: "float32"."""
    found: torch.dtype = getattr(torch, name)
    return found


class DeferredTensor(Deferred, torch.Tensor):  # type: ignore[misc, override]
    """A tensor that will exist when the block has run."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder = _recorder_of((*args, *(kwargs or {}).values()))
        found = _FUNCTIONS.get(func)
        if found is not None:
            name, swapped = found
            args = (args[1], args[0], *args[2:]) if swapped else args
            return recorder.op(name, args, kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__
        if name in ops.INPLACE and is_deferred(args[0]):
            return in_place(args[0], name)(*args[1:], **(kwargs or {}))
        if name in ("__setitem__", "__set__") or name in ops.INPLACE:
            raise BadArgument(
                "a real tensor can't take a deferred value, which has no numbers yet; compute a new value, "
                "or keep it, saved, in a list or dictionary"
            )
        if name in _KNOWN:
            return getattr(args[0], name)(*args[1:]) if name not in _ATTRIBUTES else getattr(args[0], name)
        raise UnknownOp(f"{ops.lookup(name).name} isn't taken in this spelling, {func}")

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size(self._spec.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return named_dtype(self._spec.dtype)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return Deferred.__repr__(self)

    def _become(self, value: Any) -> None:
        become(self, value)


_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})
_KNOWN = _ATTRIBUTES | {"size", "dim", "numel", "is_floating_point", "element_size", "__len__", "nelement"}


class SavedTensor(torch.Tensor):
    """A saved value: a tensor like any other. What is computed from it is a plain tensor.

    `value` is the same memory as a plain `torch.Tensor`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _keep_gradient(self, gradient: torch.Tensor) -> None:
        self.grad = gradient.as_subclass(torch.Tensor)

    @property
    def value(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    @property
    def logits(self) -> torch.Tensor:
        """The tensor itself: notebooks read `.logits` of a saved model output."""
        return self

    def detach(self) -> torch.Tensor:
        # nn.Parameter insists on its argument's own class.
        return torch.Tensor.detach(self).as_subclass(type(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.value.__deepcopy__(memo)  # type: ignore[no-any-return, no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


def make(recorder: Recorder, base: Base, chain: tuple[View, ...], node: int) -> DeferredTensor:
    """The deferred tensor of a node."""
    spec = recorder.spec(node)
    meta = _meta(spec.shape, spec.dtype) if isinstance(spec, TensorSpec) else _meta((), "float32")
    value: DeferredTensor = torch.Tensor._make_subclass(DeferredTensor, meta)
    value._begin(recorder, base, chain, node)
    return value


@lru_cache(maxsize=256)
def _meta(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """What deferred tensors of a shape are made of. It holds no memory."""
    return torch.empty(shape, dtype=named_dtype(dtype), device="meta")


def become(deferred: torch.Tensor, value: torch.Tensor) -> None:
    """Put a real tensor's content into a deferred one."""
    real = value.as_subclass(SavedTensor)
    torch._C._swap_tensor_impl(deferred, real)
    deferred.__dict__.clear()
    deferred.__class__ = SavedTensor


def whole(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of whole numbers as one plain tensor."""
    return torch.tensor(rows)


def stacked(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Saved values as one plain tensor."""
    return torch.stack([value.as_subclass(torch.Tensor) for value in values])


def _recorder_of(values: Any) -> Recorder:
    for value in values:
        if is_deferred(value):
            return value._recorder  # type: ignore[no-any-return]
        if isinstance(value, (tuple, list)):
            try:
                return _recorder_of(value)
            except LookupError:
                continue
    raise LookupError("no deferred value among the arguments")
