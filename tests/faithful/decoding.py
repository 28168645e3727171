"""Greedy decoding written by hand, with hooks at chosen steps: what our generations are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]
At = tuple[int, str]
"""Step, and path of a module."""


class Decoded:
    """What a decoding gave: `tokens` [1, all], and each step's outputs of the modules and logits."""

    def __init__(self, tokens: Tensor, seen: Mapping[At, Tensor]) -> None:
        self.tokens = tokens
        self._seen = seen

    def __getitem__(self, at: At) -> Tensor:
        return self._seen[at]


@torch.no_grad()
def decode(model: Any, ids: Sequence[int], new: int, edits: Mapping[At, Edit] | None = None) -> Decoded:
    """Decode `new` tokens greedily through the model's own cache, never looking at its `generate`.

    Args:
        edits: (step, module path) -> what takes the place of that module's first output there.
    """
    seen: dict[At, Tensor] = {}
    step = 0

    def watch(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, Tensor):
                return None
            edit = (edits or {}).get((step, path))
            seen[step, path] = first.clone() if edit is None else edit(first.clone())
            if edit is None:
                return None
            return (seen[step, path], *output[1:]) if isinstance(output, tuple) else seen[step, path]

        return hook

    keeps = next(k for k in ("past_key_values", "cache_params") if k in inspect.signature(model.forward).parameters)
    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules() if path]
    try:
        tokens, feed, state = torch.tensor([list(ids)]), torch.tensor([list(ids)]), None
        for step in range(new):
            output = model(input_ids=feed, **{keeps: state}, use_cache=True)
            state, seen[step, ""] = output[keeps], output.logits
            feed = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, feed], dim=1)
    finally:
        for handle in handles:
            handle.remove()
    return Decoded(tokens, seen)
