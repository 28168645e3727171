"""TransformerLens's names: `from interpose.transformer_lens import HookedTransformer, utils`."""

from ..lens import ActivationCache, HookPoint
from . import hook_points, utils
from .hooked import HookedTransformer

__all__ = ["ActivationCache", "HookPoint", "HookedTransformer", "hook_points", "utils"]
