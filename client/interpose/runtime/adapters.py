"""LoRA adapters beside a model: which one a run goes with is the run's own, and the module tree stays the model's.

An adapter's layers are those of the `peft` library, so its numbers are that library's own. They aren't put into
the model, where they would stand in the place of the modules they change, and every path, hook point and weight
would be called otherwise. Each is kept beside its module instead. That module's forward asks which adapter the run
at hand has chosen, and without one does what it always did.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, OpFailed
from ..graph.adapters import AdapterInfo
from .hooks import CURRENT
from .offloaded import parameter as own_parameter

NAME = "default"
"""What every adapter is called within its own layers, where it is the only one."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """Attributes:
    layers: the model's modules -> the library's layers that run in their place.
    """

    info: AdapterInfo
    layers: Mapping[nn.Module, Any]


_CHOSEN: ContextVar[tuple[str, Mapping[nn.Module, Any]] | None] = ContextVar("interpose_adapter", default=None)
"""Its name and layers."""


@contextmanager
def chosen(adapters: Mapping[str, Adapter], name: str | None) -> Iterator[None]:
    """What runs inside, in this context, runs with an adapter; with None, without any."""
    token = _CHOSEN.set(None if name is None else (name, adapters[name].layers))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def choice() -> str | None:
    """The name of the adapter that was chosen in this context."""
    return (_CHOSEN.get() or (None,))[0]


def _layer(module: nn.Module) -> Any:
    """What runs in a module's place, None for itself."""
    return (_CHOSEN.get() or ("", _NONE))[1].get(module)


_NONE: Mapping[nn.Module, Any] = {}


def parameter(module: nn.Module, name: str) -> tuple[Tensor, bool]:
    """A module's parameter as a run has it that chose as this context, detached, and whether an adapter made it.

    Raises:
        AttributeError: there is none of that name.
        OpFailed: as `adapted`.
    """
    own = own_parameter(module, name)
    changed = adapted(module, name)
    return (own, False) if changed is None else (changed.detach(), True)


def adapted(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter as the chosen adapter makes it, "weight" or "bias"; None where it is the model's own.

    Raises OpFailed: there is no such form of it.
    """
    layer = _layer(module)
    if layer is None:
        return None
    if name == "bias":
        added = getattr(layer.lora_B[NAME], "bias", None) if NAME in layer.lora_B else None
        return None if added is None else module.get_parameter(name) + added * layer.scaling[NAME]
    weight = module.get_parameter(name)
    if not weight.is_floating_point():
        raise OpFailed("a quantized weight has no form with an adapter in it; read it in a run without one")
    variant = layer.lora_variant.get(NAME)
    if variant is not None:
        merged: Tensor = variant.merge_safe(layer, NAME, weight.detach().clone())
        return merged
    delta: Tensor = layer.get_delta_weight(NAME)
    return weight + delta.to(weight.dtype)


class _Choosing:
    """Stands before a module's forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._set = vars(module).get("forward")
        """What was set on it alone, as accelerate's hooks are. Its class's isn't kept: copies have their own."""

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self._set is not None:
            return self._set(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = _layer(self.module)
        if layer is None:
            return self.plain(*args, **kwargs)
        scope = CURRENT.get()
        if scope is None:
            return layer(*args, **kwargs)
        scope.running.append(None)  # functions that the adapter calls aren't the module's
        try:
            return layer(*args, **kwargs)
        finally:
            scope.running.pop()

    def within(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, called by its adapter's layer."""
        scope = CURRENT.get()
        if scope is None or len(scope.running) < 2:
            return self.plain(*args, **kwargs)
        scope.running.append(scope.running[-2])
        try:
            return self.plain(*args, **kwargs)
        finally:
            scope.running.pop()


def attach(layers: Mapping[nn.Module, Any]) -> None:
    """Have modules ask for the run's adapter, and its layers call their own forwards."""
    for module, layer in layers.items():
        stands = vars(module).get("forward")
        if not isinstance(stands, _Choosing):
            stands = _Choosing(module)
            module.forward = stands
        layer.base_layer = _bare(module, stands)


def _bare(module: nn.Module, stands: _Choosing) -> nn.Module:
    """The module for its adapter's layer: its weights and its own forward, nobody's hooks."""
    bare = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks") or "_hooks_" in name:
            vars(bare)[name] = OrderedDict() if isinstance(value, Mapping) else value
    bare.forward = stands.within
    return bare


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[dict[nn.Module, Any]]:
    """Layers that are put into a model inside are taken out again; they are in what this gives, by module.

    Raises ConfigError: the model's own weights were changed.
    """
    found: dict[nn.Module, Any] = {}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
    own = [(value, value._version, value.requires_grad) for value in (*model.parameters(), *model.buffers())]
    settings, training = dict(vars(model)), model.training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield found
        for parent, name, child in places:
            if parent._modules[name] is not child:
                found[child] = parent._modules[name]
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
        for name in [name for name in vars(model) if name not in settings]:
            delattr(model, name)
        for value, _, wanted in own:
            if value.requires_grad is not wanted:
                value.requires_grad_(wanted)
        model.train(training)
    # Nothing here writes to them, as far as is known; if it did, runs without an adapter would be others' too.
    if any(value._version != version for value, version, _ in own):
        raise ConfigError("loading an adapter changed the model's own weights; load the model again, without it")
