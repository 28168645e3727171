"""A part of a model: its own class, of which only the wanted parameters and buffers are there; the rest is meta.

The library's own steps of `from_pretrained` are taken (its renamings, the experts it fuses, tied weights, buffers
it computes), with two differences: of a checkpoint only the tensors that are needed are opened, from only the files
that hold them, and nothing is dispatched by hooks. So a process that holds a tenth of a model reads and downloads
about a tenth. On a CPU the weights are views of the files, as the library has them: memory that processes on one
machine share, and that is taken as it is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ConfigError, first_line
from .quantized import scheme
from .sources import ODD, Source, model_class, torch_device, torch_dtype
from .transformers_internals import (
    LIBRARY,
    Filling,
    add_generation_config,
    built,
    finish_quantized,
    quantizer_of,
    settle_dtype,
)
from .weights import Weights

Keep = Callable[[str], bool]
"""Whether a parameter or buffer, by its full name, is wanted."""

META = torch.device("meta")


def inside(paths: Iterable[str]) -> Keep:
    """What lies in the modules of these paths."""
    roots = tuple(f"{path}." for path in paths)
    return lambda name: name.startswith(roots)


def outside(paths: Iterable[str]) -> Keep:
    """All but what lies in the modules of these paths."""
    within = inside(paths)
    return lambda name: not within(name)


def outline(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config, all of it on meta: shapes and dtypes without a byte of weights.

    Args:
        dtype: of the weights; default: as the config says, or float32.

    Raises:
        ConfigError: the library can't make it.
    """
    LIBRARY.check()
    config = copy.deepcopy(config)
    try:
        _set_dtype(config, dtype or _as_dtype(config.dtype) or torch.float32)
        return built(model_class(config), config)
    except (*ODD, ImportError) as error:
        raise ConfigError(f"no model can be made of this config: {first_line(error)}") from error


def load_part(
    source: str | Path,
    keep: Keep,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    quantization: str | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """A model in eval mode, without gradients, of which only what is wanted is read; bitwise as `load` has it.

    A tied weight that is wanted at one place is there at its others, too.

    Args:
        keep: asked for each parameter and buffer. What decides is best a module, such as a block: a tensor that the
            library makes with others from one of the file's is there only if they are wanted alike.
        device, dtype, revision, quantization, local_files_only: as of `load`; "auto" is no device here.

    Raises:
        ConfigError: no such folder, device or dtype; weights that aren't in safetensors, that lack something
            wanted, or that the library can't load on the device.
        ModelUnavailable: the hub doesn't give it.
    """
    LIBRARY.check()
    at = Source.of(source, revision, local_files_only=local_files_only)
    config = at.config()
    at = at.fixed(config)
    wanted_dtype, place = torch_dtype(dtype), torch_device(device)
    weights = at.fetch(lambda: Weights.find(at, config))
    chosen = scheme(quantization).get("quantization_config")
    quantizer = at.fetch(lambda: quantizer_of(config, chosen, place))
    resolved = at.fetch(lambda: _set_dtype(config, wanted_dtype, quantizer, weights))
    model = at.fetch(lambda: built(model_class(config), config, quantizer, place))
    part = _Part.of(model, keep, place)
    filling = Filling(model, at.place, part.device_map, resolved, quantizer)
    at.fetch(lambda: _fill(filling, part, weights))
    nn.Module.eval(model).requires_grad_(False)
    add_generation_config(model, at.place, at.hub)
    if quantizer is not None:
        finish_quantized(model, quantizer)
    part.check(model)
    return model


@dataclass(frozen=True)
class _Part:
    """Which tensors of a model are wanted, and the device of each module, as the library asks for it."""

    names: frozenset[str]
    device: torch.device
    device_map: Mapping[str, torch.device]

    @classmethod
    def of(cls, model: PreTrainedModel, keep: Keep, device: torch.device) -> _Part:
        every = [name for name, _ in _tensors(model)]
        names = {name for name in every if keep(name)}
        for group in _tied(model):
            if names & group:
                names |= group
        placed: dict[str, torch.device] = {"": META}
        _cover(every, names, device, placed)
        return cls(frozenset(names), device, placed)

    def check(self, model: nn.Module) -> None:
        """That all that is wanted is there, and nothing else."""
        real = {name for name, tensor in _tensors(model) if not tensor.is_meta}
        if lacking := sorted(self.names & {name for name, _ in _tensors(model)} - real):
            raise ConfigError(
                f"{lacking[0]} is made together with tensors of modules that aren't wanted, so this part can't be "
                "loaded: take whole blocks"
            )
        for name in real - self.names:
            owner, _, at = name.rpartition(".")
            empty(model.get_submodule(owner), at)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def empty(module: nn.Module, name: str) -> None:
    """Let go of the numbers of a module's own parameter or buffer, if it is there."""
    if (weight := module._parameters.get(name)) is not None:
        module._parameters[name] = nn.Parameter(weight.to(META), requires_grad=False)
    elif (buffer := module._buffers.get(name)) is not None:
        module._buffers[name] = buffer.to(META)


def _tied(model: PreTrainedModel) -> list[set[str]]:
    """Names that stand for one tensor."""
    groups: dict[str, set[str]] = {}
    for name, of in model.all_tied_weights_keys.items():
        groups.setdefault(of, {of}).add(name)
    return list(groups.values())


def _cover(every: Iterable[str], wanted: set[str], device: torch.device, placed: dict[str, torch.device]) -> None:
    """A device for every module that is all wanted or all not, and for single tensors elsewhere.

    All siblings are named: the library takes the first name that a tensor's begins with, the longest before others.
    """

    def divide(names: list[str], depth: int) -> None:
        below: dict[str, list[str]] = {}
        for name in names:
            below.setdefault(".".join(name.split(".")[: depth + 1]), []).append(name)
        for root, its in below.items():
            kept = {name in wanted for name in its}
            if len(kept) == 1:
                placed[root] = device if kept.pop() else META
            else:
                divide(its, depth + 1)

    divide(list(every), 0)


def _fill(filling: Filling, part: _Part, weights: Weights) -> None:
    """Read what is wanted: of a checkpoint the tensors of which something wanted is made."""
    targets = filling.targets()
    names = [name for name in weights.names() if not part.names.isdisjoint(targets(name))]
    with ExitStack() as stack:
        info = filling.fill(weights.slices(names, stack))
    if missing := filling.finish(info, part.names):
        raise ConfigError(
            f"{weights.source.place} holds no weights for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}"
        )


def _set_dtype(
    config: PretrainedConfig, dtype: Any, quantizer: Any = None, weights: Weights | None = None
) -> torch.dtype:
    """Settle "auto" as the library does, and tell the config and its parts."""
    file = [weights.any_file()] if weights is not None and dtype == "auto" and config.dtype is None else None
    metadata = dict(weights.metadata) if weights is not None and weights.files is not None else None
    return _as_dtype(settle_dtype(config, dtype, file, metadata, quantizer)) or torch.float32


def saved_dtype(source: Source, config: PretrainedConfig) -> torch.dtype:
    """That of weights as they were saved: what "auto" comes to. Raises ConfigError where none are there."""
    return source.fetch(lambda: _set_dtype(copy.deepcopy(config), "auto", None, Weights.find(source, config)))


def _as_dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) else None
