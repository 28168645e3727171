"""Torch's fused attention written out, with its inner values shown, for models that call it themselves.

Their looking runs take this form, as those of models with an attention interface take the library's eager one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .hooks import Scope


def explicit(
    scope: Scope,
    module: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of [batch, heads, seq, width], step by step; dropout is off in eval mode.

    Args:
        module: the touched module whose forward calls it, None for one that isn't touched.
    """
    scope.explicit += 1
    tap = scope.tap(module)
    query, key, value = tap("q_rot", query), tap("k_rot", key), tap("v", value)
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    keys, values = (part.repeat_interleave(groups, -3) if groups > 1 else part for part in (key, value))
    scores = query @ keys.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    lowest = torch.finfo(scores.dtype).min
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, lowest)
    elif attn_mask is not None:
        scores = scores + attn_mask
    pattern = tap("scores", scores).softmax(-1, dtype=torch.float32).to(value.dtype)
    out: Any = tap("pattern", pattern) @ values
    # Its layout in memory is the fused form's: models go on with views.
    made: Tensor = tap("z", out.transpose(-3, -2)).transpose(-3, -2).contiguous()
    return made
