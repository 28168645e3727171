"""Running a module for what it shows, so that nothing of it is changed afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

LARGE_BYTES = 16 << 20
"""Larger buffers are weights by another name, which no forward writes; copying them would double a model."""


@contextmanager
def rehearsal(module: nn.Module) -> Iterator[None]:
    """What forwards inside write into buffers, and draw at random, is undone.

    They work on copies, and their owner's own come back: what is written back would look like a write to a backward
    that is still to come. Plain numbers and tensors kept as attributes, such as counters, come back too.
    """
    devices = {param.device.index for param in module.parameters() if param.is_cuda}
    copies: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
        for part in module.modules():
            stack.enter_context(_copied(part, copies))
        yield


@contextmanager
def _copied(module: nn.Module, copies: dict[int, Tensor]) -> Iterator[None]:
    """One module with copies in place of its own; `copies` by the original's id, as several may hold one."""
    buffers, attributes = module._buffers, vars(module)
    own, before = dict(buffers), set(attributes)
    beside = {name: value for name, value in attributes.items() if plain(value)}

    def copy(value: Tensor) -> Tensor:
        return copies.setdefault(id(value), value.clone()) if value.nbytes <= LARGE_BYTES else value

    buffers.update({name: None if value is None else copy(value) for name, value in own.items()})
    attributes.update({name: copy(value) for name, value in beside.items() if isinstance(value, Tensor)})
    try:
        yield
    finally:
        buffers.clear()
        buffers.update(own)
        for name in [name for name, value in attributes.items() if plain(value) and name not in before]:
            del attributes[name]
        for name, value in beside.items():
            if attributes.get(name) is not value:
                attributes[name] = value


def plain(value: object) -> bool:
    """Whether an attribute of a module is state that forwards may change: a number, a tensor, or None."""
    return value is None or isinstance(value, (bool, int, float, Tensor))
