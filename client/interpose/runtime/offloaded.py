"""Parameters that lie on disk or in another memory until their module runs, as accelerate's hooks have it.

Outside of a forward such a parameter is on `meta`, without numbers. Whoever reads one beside a forward does so
while its module has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Inside, a module's own parameters have their numbers."""
    with ExitStack() as after:
        for hook in _hooks(module):
            hook.pre_forward(module)
            after.callback(hook.post_forward, module, None)
        yield


def parameter(module: nn.Module, name: str) -> Tensor:
    """A module's parameter with its numbers, detached. Raises AttributeError without one of that name."""
    return brought(module, name, module.get_parameter(name).detach())


def brought(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """A tensor that a module has by a name, with its numbers if they lie elsewhere."""
    if not value.is_meta or not _hooks(module):
        return value
    with present(module):
        found: Tensor = getattr(module, name, value)
        return found.detach()


def _hooks(module: nn.Module) -> list[Any]:
    """Those that bring a module's own parameters and take them away again."""
    hook = getattr(module, "_hf_hook", None)
    found = getattr(hook, "hooks", (hook,))
    return [each for each in found if isinstance(each, AlignDevicesHook) and each.offload]
