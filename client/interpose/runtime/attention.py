"""Attention that can be looked into: the model's own default until a run looks, its eager form while one does.

One attention function and one mask function for each default are registered with the transformers library; a
loaded model's configs name them from then on, and nothing changes while serving. Whether anybody looks is asked of
the context's run at each call.

Points inside an attention module, in the order they come to be: "q_rot" and "k_rot" [batch, heads, seq or key,
width] (after rotary positions, where the model has them), "v", "scores" [batch, heads, seq, key] (mask added),
"pattern" (after softmax), "z" [batch, seq, heads, width].
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .hooks import CURRENT, Looking, Scope, hooked
from .inputs import principal

READABLE = "interpose"
"""What `Manifest.attention` says of a model whose attention can be looked into."""

NAMES = {"sdpa": "interpose_sdpa", "eager": "interpose_eager"}
"""The library's name of a default -> the name under which ours is registered."""

_SOFTMAX = frozenset({functional.softmax, torch.softmax, Tensor.softmax})
_DROPOUT = frozenset({functional.dropout, torch.dropout})


def _scope() -> Scope | None:
    """The run that looks inside attention, if the present one does."""
    scope = CURRENT.get()
    return scope if scope is not None and scope.visitor.attention else None


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention beside an attention module's class. Raises LookupError without one."""
    for base in type(module).__mro__:
        found: Callable[..., Any] | None = vars(sys.modules[base.__module__]).get("eager_attention_forward")
        if found is not None:
            return found
    raise LookupError(f"{type(module).__name__} has no eager attention function")


def _attention(default: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,  # some models give it by this name
        **kwargs: Any,
    ) -> Any:
        scope = CURRENT.get()
        with nullcontext() if scope is None else scope.veil():
            if scope is not None and scope.visitor.attention:
                return _look(scope, module, query, key, value, attention_mask, **kwargs)
            stock = _eager(module) if default == "eager" else ALL_ATTENTION_FUNCTIONS[default]
            return stock(module, query, key, value, attention_mask, **kwargs)

    return attention


def _mask(default: str) -> Callable[..., Any]:
    stock = ALL_MASK_ATTENTION_FUNCTIONS[default]
    eager = ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def mask(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs) if _scope() is None else eager(*args, **kwargs)

    return mask


def _look(
    scope: Scope, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Eager attention, with taps if the run touches this module."""
    eager = _eager(module)
    if not scope.touches(module):
        return eager(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
    tap = scope.taps(module)
    query, key, value = tap("q_rot", query), tap("k_rot", key), tap("v", value)
    with _Inside(tap):
        out, weights = eager(module, query, key, value, mask, **kwargs)
    return tap("z", out), weights


class _Inside(TorchFunctionMode):
    """Finds the first softmax, and the first dropout after it, of the function it surrounds."""

    def __init__(self, tap: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self._tap = tap
        self._waits = iter((("scores", _SOFTMAX), ("pattern", _DROPOUT), ("", frozenset())))
        self._event, self._funcs = next(self._waits)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._funcs:
            event = self._event
            self._event, self._funcs = next(self._waits)
            if args:
                args = (self._tap(event, args[0]), *args[1:])
            else:
                kwargs["input"] = self._tap(event, kwargs["input"])
        return func(*args, **kwargs)


def register() -> None:
    """Make ours known to the library. Adds names, changes none; harmless to repeat."""
    for default, name in NAMES.items():
        AttentionInterface.register(name, _attention(default))
        AttentionMaskInterface.register(name, _mask(default))


@torch.no_grad()
def install(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> str:
    """Set ours on a model's configs, if that leaves every number as it was.

    Args:
        model: in eval mode.
        batches: keyword arguments of forwards on which to prove it: unpadded, padded.

    Returns:
        `READABLE`, or why this model's attention can't be looked into; then the model is as before.
    """
    configs = _configs(model)
    if not isinstance(model, PreTrainedModel):
        return "it isn't a model of the transformers library"
    if not model._can_set_attn_implementation():
        return _direct(model, batches)
    before = [config._attn_implementation for config in configs]
    if set(before) & set(NAMES.values()):
        register()  # a live model that was wrapped before, or a copy of one
        return READABLE
    names = [NAMES.get(name) or name for name in before]
    if not set(before) & set(NAMES):
        return f"its attention runs as {before[0]}, which has no inner values"
    if not batches:
        return "it doesn't run on token ids alone"
    register()
    plain = [principal(model(**batch)) for batch in batches]
    with _implementations(configs, ["eager"] * len(configs)):
        eager = [principal(model(**batch)) for batch in batches]
    # On a GPU some kernels add in no fixed order; then the stock model differs from itself, and bits prove nothing.
    exact = all(torch.equal(principal(model(**b)), out) for b, out in zip(batches, plain, strict=True))
    with _implementations(configs, names):
        reason = _differs(model, batches, plain, eager, exact=exact)
    if reason:
        return reason
    _set(configs, names)
    return READABLE


def adopt(model: nn.Module) -> None:
    """Set ours on the configs of a model whose attention is elsewhere, and was found readable there."""
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        return
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    register()
    _set(configs, [NAMES.get(name) or name for name in before])


def _direct(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> str:
    """`READABLE` for a model that calls torch's fused attention itself, and does the same with it written out."""
    visitor = Looking()
    for batch in batches:
        plain = _real(principal(model(**batch)), batch)
        with hooked({}, {}, visitor) as scope:
            found = _real(principal(model(**batch)), batch)
        if not scope.explicit:
            return f"{type(model).__name__} doesn't use the transformers library's attention interface"
        if not _same(found, plain, exact=False):
            return "its fused attention can't be reproduced step by step"
    return READABLE if batches else "it doesn't run on token ids alone"


def _real(output: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """An output [rows, positions, ...] without padded positions: what attention makes there is anybody's choice."""
    mask = batch.get("attention_mask")
    return output if mask is None or mask.shape != output.shape[:2] else output[mask.bool()]


def _differs(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    plain: Sequence[Tensor],
    eager: Sequence[Tensor],
    *,
    exact: bool,
) -> str:
    """Why ours isn't the model's own, or ""."""

    def same(expected: Sequence[Tensor]) -> bool:
        found = [principal(model(**batch)) for batch in batches]
        return all(_same(one, other, exact=exact) for one, other in zip(found, expected, strict=True))

    try:
        if not same(plain):
            return "its results would change under an attention that can be looked into"
        with hooked({}, {}, Looking()):
            if not same(eager):
                return "its eager attention can't be reproduced"
    except LookupError as error:
        return str(error)
    return ""


def _same(one: Tensor, other: Tensor, *, exact: bool) -> bool:
    one, other = one.nan_to_num(), other.nan_to_num()
    if exact:
        return torch.equal(one, other)
    tolerance = 8 * torch.finfo(one.dtype).eps * float(other.abs().max())
    return float((one - other).abs().max()) <= max(tolerance, 1e-5 * float(other.abs().max()))


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every config the model's modules hold, each once, sub-configs included."""
    found: dict[int, PretrainedConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def _set(configs: Sequence[PretrainedConfig], names: Sequence[str | None]) -> None:
    # The public setter hands one name down to all sub-configs, which may have had different ones.
    for config, name in zip(configs, names, strict=True):
        config._attn_implementation_internal = name


@contextmanager
def _implementations(configs: Sequence[PretrainedConfig], names: Sequence[str | None]) -> Iterator[None]:
    before = [config._attn_implementation for config in configs]
    try:
        _set(configs, names)
        yield
    finally:
        _set(configs, before)
