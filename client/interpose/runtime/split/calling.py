"""Modules and parameters of one site, for graphs that run at another: asked for there, gradients included.

A gradient isn't kept for: the site that has the module runs it once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ...errors import BadArgument, InternalError
from ...graph.limits import Limits
from ..adapters import chosen, parameter
from ..calls import check_call
from ..failures import plain
from ..hooks import no_hooks
from .mapping import moved
from .route import HOME, Ask, Nest
from .sites import Sites

if TYPE_CHECKING:
    from ..loading import Loaded

CALL, PARAMETER = "call", "parameter"
"""Errands: a module called on a value, or its gradient there; a parameter of a module."""

Way: TypeAlias = Callable[[], Ask]
"""How others are asked where a graph is under way. Raises InternalError where nobody may be."""


class Elsewhere:
    """What a site's graphs ask of others.

    Args:
        site: this one.
        way: to the others.
    """

    def __init__(self, sites: Sites, site: int, way: Way) -> None:
        self._sites = sites
        self._site = site
        self._way = way

    def has(self, path: str) -> bool:
        """Whether a module is at another site."""
        return self._sites.of(path) != self._site

    def parameter(self, path: str, name: str, adapter: str | None) -> tuple[Any, bool]:
        """Another site's parameter, brought here, and whether an adapter made it."""
        request = {"path": path, "name": name, "adapter": adapter}
        value, made = self._way()(self._sites.of(path), PARAMETER, request)
        return value, made

    def call(self, path: str, value: Any, limits: Limits, adapter: str | None) -> Any:
        """What the module returns, one tensor. Raises as the module called here would."""
        ask, site = self._way(), self._sites.of(path)
        request = {"path": path, "limits": limits.as_dict(), "adapter": adapter}
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            return _Call.apply(value, ask, site, request)  # type: ignore[no-untyped-call]
        return _brought(ask(site, CALL, {**request, "value": value}), value)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, ask: Ask, site: int, request: dict[str, Any]) -> Any:
        ctx.save_for_backward(value)
        ctx.told = ask, site, request
        return _brought(ask(site, CALL, {**request, "value": value.detach()}), value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (value,) = ctx.saved_tensors
        ask, site, request = ctx.told
        found = ask(site, CALL, {**request, "value": value.detach(), "gradient": gradients[0]})
        return _brought(found, value), None, None, None


def _brought(found: Any, value: Any) -> Any:
    """An answer where what was asked about is."""
    return moved(found, value.device) if isinstance(found, Tensor) and isinstance(value, Tensor) else found


class Owned:
    """What a site does for others with the modules it has. On any thread; it waits for nobody.

    Args:
        modules: that others may have called, by path.
        loaded: the site's model.
    """

    def __init__(self, modules: Mapping[str, nn.Module], loaded: Loaded) -> None:
        self._modules = modules
        self._manifest = loaded.manifest
        self._device = torch.device(loaded.device)
        self._adapters = loaded.adapters

    def errand(self, name: str, request: Nest) -> Nest:
        work: Mapping[str, Callable[[Nest], Nest]] = {CALL: self._call, PARAMETER: self._parameter}
        if name not in work or request["path"] not in self._modules:
            raise InternalError(f"{name!r} of {request['path']!r} can't be asked of this site")
        # Whoever asks may be of this very process, and in a run with another adapter.
        with torch.no_grad(), chosen(self._adapters, request["adapter"]):
            return work[name](request)

    def _parameter(self, request: Nest) -> Nest:
        return [*parameter(self._modules[request["path"]], request["name"])]

    def _call(self, request: Nest) -> Nest:
        path, value, gradient = request["path"], request["value"], request.get("gradient")
        module = self._modules[path]
        check_call(self._manifest, module, path, value, Limits(**request["limits"]))
        value = moved(value, self._device)
        try:
            with no_hooks(), torch.set_grad_enabled(gradient is not None):
                given = value if gradient is None else value.detach().requires_grad_()
                output = module(given)
                if not isinstance(output, Tensor):
                    raise BadArgument(f"{path} returns no single tensor, so it can't be called on a value")
                return output if gradient is None else _gradient(output, given, moved(gradient, self._device))
        except Exception as error:
            raise plain(error) from error


def _gradient(output: Tensor, given: Tensor, gradient: Tensor) -> Tensor:
    # Torch has one thread a device for all backwards, and that of whoever waits for this may be holding it.
    with torch.autograd.set_multithreading_enabled(False):
        (found,) = torch.autograd.grad(output, given, gradient)
    return found


def far(loaded: Loaded) -> Elsewhere | None:
    """What home's graphs ask of shards."""
    split = loaded.split
    return None if split is None else Elsewhere(split.sites, HOME, lambda: split.route.errand)


def answer(loaded: Loaded) -> None:
    """Have home do errands for shards in the middle of a block: with modules of its own that hold no blocks."""
    assert loaded.split is not None
    sites = loaded.split.sites
    own = {path: module for path, module in loaded.modules.items() if sites.outside(path)}
    loaded.split.route.answer(Owned(own, loaded).errand)
