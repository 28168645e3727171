"""Saving many hook points at once: by pattern, or all modules' outputs and inputs."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BadArgument, UnknownModule, UnknownPoint
from ..graph.manifest import leaves
from . import standard
from .keeping import save
from .nests import Nest

if TYPE_CHECKING:
    from .handles import Module
    from .tracer import Model


class Cache(dict[str, Any]):
    """Saved values by the name of their hook point, in the order of the model."""

    def save(self) -> Cache:
        """Nothing more to do: its values are saved."""
        return self


def collect(model: Model, patterns: Sequence[Any]) -> Cache:
    """Save every hook point that matches one of the patterns. Raises UnknownPoint if one matches nothing."""
    from .handles import Module

    cache = Cache()
    for pattern in patterns:
        names = {f"{pattern._path}.output": (pattern._path, "output")} if isinstance(pattern, Module) else {}
        names = names or dict(_matching(model, pattern))
        if not names:
            like = next((path for path in model._tree().modules if path.endswith(".0")), "lm_head")
            raise UnknownPoint(
                f"no hook point matches {pattern!r}; one is named like {like}.output, "
                "and those of standard names like blocks.0.resid_post"
            )
        for name, (path, point) in names.items():
            if name not in cache:
                cache[name] = Module(model, path).points[point].save()
    return cache


def _matching(model: Model, pattern: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names that match, each with its module's path and the point's name there."""
    wanted = pattern.split(".")
    tree = model._tree()
    own = (
        (path, point)
        for path, info in tree.modules.items()
        for point, layout in info.points.items()
        if leaves(layout)
    )
    foreign = standard.lens(tree) if "hook_" in pattern else ()
    for path, point in (*own, *(("", name) for name in (*standard.every(tree), *foreign))):
        name = f"{path}.{point}" if path else point
        parts = name.split(".")
        if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            yield name, (path, point)


class ModuleCache(dict[str, "Kept"]):
    """What modules returned and were given, as the block left it: `cache["model.transformer.h.0"].output`.

    Keys are paths after `model.`, as nnsight's caches have them; the path alone does too, and so do attributes:
    `cache.model.transformer.h[0].output`.
    """

    def __missing__(self, path: str) -> Kept:
        if f"model.{path}" in self:
            return self[f"model.{path}"]
        raise UnknownModule(f"the cache holds no {path!r}; it holds {', '.join(list(self)[:3])}, ...")

    def __getattr__(self, name: str) -> Branch:
        if name.startswith("__"):
            raise AttributeError(name)
        found: Branch = getattr(Branch(self, ""), name)
        return found

    def save(self) -> ModuleCache:
        """Nothing more to do: its values are saved."""
        return self


class Kept:
    """What one module returned and was given."""

    output: Any = None
    inputs: Any = None

    @property
    def input(self) -> Any:
        """The first argument."""
        if self.inputs is None:
            raise UnknownPoint("inputs aren't in this cache: t.cache(..., include_inputs=True)")
        return self.inputs.first() if isinstance(self.inputs, Nest) else self.inputs

    def __repr__(self) -> str:
        return f"<kept: {', '.join(name for name in ('output', 'inputs') if name in self.__dict__)}>"


class Branch:
    """A path into a cache, as attributes and indices."""

    def __init__(self, cache: ModuleCache, path: str) -> None:
        self._cache, self._path = cache, path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("output", "inputs", "input"):
            return getattr(self._cache[self._path], name)
        path = f"{self._path}.{name}" if self._path else name
        for known in (path, f"model.{path}"):
            if any(f"{key}.".startswith(f"{known}.") for key in self._cache):
                return Branch(self._cache, known)
        raise UnknownModule(f"the cache holds nothing of {path}")

    def __getitem__(self, index: int) -> Branch:
        found: Branch = getattr(self, str(index))
        return found


def collect_modules(
    model: Model, modules: Sequence[Any] | None, *, outputs: bool, inputs: bool, dtype: Any
) -> tuple[ModuleCache, Callable[[], None]]:
    """An empty cache of modules, all of them for None, and what fills it with their values of that moment."""
    from .handles import Module

    if not (outputs or inputs):
        raise BadArgument("a cache holds outputs, inputs or both")
    chosen = [_handle(model, module) for module in modules] if modules is not None else list(_called(model))
    cache = ModuleCache({f"model.{module._path}" if module._path else "model": Kept() for module in chosen})

    def fill() -> None:
        for module, kept in zip(chosen, cache.values(), strict=True):
            points = Module(module._owner, module._path, module._call).points
            if outputs:
                kept.output = save(_cast(points["output"], dtype))
            if inputs:
                kept.inputs = save(_cast(points["inputs"], dtype))

    return cache, fill


def _cast(value: Any, dtype: Any) -> Any:
    return value if dtype is None or not hasattr(value, "dtype") else value.to(dtype)


def _handle(model: Model, module: Any) -> Module:
    from .handles import Module

    if isinstance(module, Module):
        return module
    if not isinstance(module, str):
        raise BadArgument(f"modules are named by handle or path, not by a {type(module).__name__}")
    tree = model._tree()
    return Module(model, module if module in tree.modules else module.removeprefix("model.").removeprefix("model"))


def _called(model: Model) -> Iterator[Module]:
    """Modules the forward calls once and that return a tensor."""
    from .handles import Module

    for path, info in model._tree().modules.items():
        once = len(info.events.get("enter", ())) == 1
        if once and info.stands_for is None and leaves(info.points.get("output")):
            yield Module(model, path)
