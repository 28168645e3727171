"""`from interpose.transformer_lens.hook_points import HookPoint`."""

from ..lens import HookPoint

__all__ = ["HookPoint"]
