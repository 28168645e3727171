"""Points that hold other numbers beside neighbours: measured, a row alone against the same row beside a longer one.

Results may not depend on neighbours, and yet a value on the way to them may. MPT counts its attention's biases
from the batch's last position, so that beside a longer row all scores are shifted, which the softmax then undoes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from ..errors import ShapeMismatch
from ..graph.manifest import ATTENTION, POINT, Layout, Leaf, ModuleInfo, walk
from ..graph.model import Key
from . import nests
from .attention import READABLE
from .feeding import examples, places
from .functions import watchable
from .hooks import Onlooker, hooked
from .independence import TOLERANCE
from .inputs import Feeding
from .pieces import joined
from .rows import Span, View

_MASKED = -1e30
SHORT, LONG = 5, 8

Place = tuple[str, str, tuple[Key, ...]]
"""Module, point, and path within it."""


@dataclass
class _Row(Onlooker):
    """Keeps the first row's part of every tensor of floats whose layout says which that is."""

    modules: Mapping[str, ModuleInfo]
    part: Span
    whole: Span
    attention: bool
    seen: dict[tuple[Place, int], torch.Tensor] = field(default_factory=dict)
    odd: set[Place] = field(default_factory=set)
    """What wasn't of the shape that was measured before."""

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        point = POINT.get(event, event)
        layout = self.modules[module].points.get(point)
        for path, tensor in nests.tensors(value) if self.attention == (event in ATTENTION) else ():
            try:
                leaf = walk(layout, path)
            except KeyError:
                continue
            if isinstance(leaf, Leaf) and leaf.by_rows and tensor.is_floating_point():
                place = (module, point, path)
                try:
                    self.seen[place, call] = View(leaf, self.part, self.whole).cut(tensor).clone()
                except ShapeMismatch:
                    self.odd.add(place)
        return value


@torch.no_grad()
def marked(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    infos: Mapping[str, ModuleInfo],
    feeding: Feeding,
    device: torch.device,
    attention: str,
) -> dict[str, ModuleInfo]:
    """`infos` with the tensors marked that a row's neighbours change. Runs the model a few times.

    Raises whatever the model's forward raises.
    """
    cases = [examples(model, feeding, [SHORT, LONG])]
    if feeding.image_token is not None:
        more = places(model, feeding)
        cases.append(examples(model, feeding, [SHORT + more, LONG + more], [1, 1]))
    names = {module: path for path, module in modules.items()}
    watched = {path: None for path, module in modules.items() if watchable(module)}
    found: set[Place] = set()
    ways = (False, True) if attention == READABLE else (False,)
    for looking, (short, long) in product(ways, cases):
        seen = []
        for runs in ([[short]], [[short], [long]]):
            inputs = joined(runs, feeding.inputs, device)
            kwargs: dict[str, Any] = feeding.kwargs(inputs)
            if "use_cache" in feeding.accepts:
                kwargs["use_cache"] = False  # as the engine's
            width, images = max(inputs.widths), len(short.tensors.get(feeding.images, ()))
            part = Span(0, 1, 0, inputs.widths[0], 0, inputs.widths[0], 0, images)
            visitor = _Row(infos, part, Span.whole(len(runs), width, width, images * len(runs)), looking)
            with hooked(modules, names, visitor, watched):
                model(**kwargs)
            seen.append(visitor.seen)
            found |= visitor.odd
        alone, beside = seen
        found |= {place for place, call in alone.keys() & beside.keys() if _moved(alone, beside, (place, call))}
    result = dict(infos)
    for path in {module for module, _, _ in found}:
        points = {
            name: _mark(layout, {inner for module, point, inner in found if (module, point) == (path, name)})
            for name, layout in infos[path].points.items()
        }
        result[path] = replace(infos[path], points=points)
    return result


def _moved(
    alone: Mapping[tuple[Place, int], torch.Tensor],
    beside: Mapping[tuple[Place, int], torch.Tensor],
    key: tuple[Place, int],
) -> bool:
    """By norm: single figures of a deep model in half precision stray further."""
    one, other = (_unmasked(seen[key]) for seen in (alone, beside))
    least = 1e-6 * max(one.numel(), 1) ** 0.5
    strayed = float((one - other).norm()) / max(float(one.norm()), least)
    return bool(strayed > TOLERANCE.get(alone[key].dtype, 0.0))


def _unmasked(value: torch.Tensor) -> torch.Tensor:
    wide = value.double()
    return wide.masked_fill(wide < _MASKED, 0).nan_to_num()


def _mark(layout: Layout, found: set[tuple[Key, ...]]) -> Layout:
    if isinstance(layout, Leaf):
        return replace(layout, alone=True) if () in found else layout
    if isinstance(layout, tuple):
        return tuple(_mark(item, _below(found, index)) for index, item in enumerate(layout))
    if isinstance(layout, dict):
        return {name: _mark(item, _below(found, name)) for name, item in layout.items()}
    return None


def _below(found: set[tuple[Key, ...]], key: Key) -> set[tuple[Key, ...]]:
    return {path[1:] for path in found if path and path[0] == key}
