"""The lists of blocks a model has, told from its modules alone: before anything is loaded or run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class BlockList:
    """Attributes:
    path: of the list, such as "model.layers".
    blocks: paths of its blocks, in order.
    """

    path: str
    blocks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.blocks)


def block_lists(model: nn.Module) -> tuple[BlockList, ...]:
    """Every list of blocks, in the order of the modules: of a model that reads images and writes texts two.

    A list of blocks is an `nn.ModuleList` whose modules all have parameters, and are all of one class or all what
    the library itself takes for a layer. Lists within a list's blocks (experts) aren't lists of blocks.
    """
    found: list[BlockList] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{other.path}.") for other in found):
            continue
        if _blocks(module):
            names = [name for name, _ in module.named_children()]
            found.append(BlockList(path, tuple(f"{path}.{name}" if path else name for name in names)))
    return tuple(found)


def main_list(model: nn.Module) -> BlockList | None:
    """The list with the most parameters, None for a model without any."""
    return max(block_lists(model), key=lambda its: _size(model.get_submodule(its.path)), default=None)


def _blocks(modules: nn.ModuleList) -> bool:
    items = list(modules)
    if not items or not all(any(True for _ in item.parameters()) for item in items):
        return False
    layers = all(isinstance(item, GradientCheckpointingLayer) for item in items)
    return layers or len({type(item) for item in items}) == 1


def _size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
