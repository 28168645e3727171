"""A split model measured by parts: each where its blocks are, on the model with all other blocks passing through.

A block that passes through returns its hidden states in the form in which the block itself returns them, and has
caches grow as it would. So a slice runs the model's own forward around its own blocks, and what is measured and
tried on it is measured and tried on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ...errors import InvalidPayload
from ...graph.inputs import decode_inputs, encode_inputs
from ...graph.manifest import Manifest, decode_manifest, encode_manifest
from .. import attention, describe, named
from ..independence import Verdict
from ..inputs import Feeding, device_of
from ..loading import described, trials
from ..probe import probe
from .home_caches import is_cache
from .route import Nest
from .shard import first_parameter, hidden_dtype


@dataclass(frozen=True)
class Report:
    """What one slice shows.

    Attributes:
        own: paths of its blocks.
        manifest: of the slice; its named and refused points are told owner by owner.
        order: the events of one forward.
        rewritten, first_only: as of `Loaded`.
        note: why it could not be measured, or "".
        about, weights: what a revision is made of, see `describe.revision_of`.
        parameters: of the whole model.
    """

    own: tuple[str, ...]
    manifest: Manifest
    order: tuple[tuple[str, str], ...]
    rewritten: frozenset[tuple[str, str]]
    first_only: frozenset[str]
    note: str
    about: str
    weights: Mapping[str, tuple[str, bytes]]
    parameters: int

    def to_nest(self) -> Nest:
        return {
            "own": [*self.own],
            "manifest": encode_manifest(self.manifest),
            "order": [[*event] for event in self.order],
            "rewritten": [[*place] for place in sorted(self.rewritten)],
            "first_only": sorted(self.first_only),
            "note": self.note,
            "about": self.about,
            "weights": [[name, form, content] for name, (form, content) in self.weights.items()],
            "parameters": self.parameters,
        }

    @classmethod
    def of_nest(cls, nest: Nest) -> Report:
        """Raises InvalidPayload."""
        try:
            return cls(
                own=tuple(nest["own"]),
                manifest=decode_manifest(nest["manifest"]),
                order=tuple((path, event) for path, event in nest["order"]),
                rewritten=frozenset((path, event) for path, event in nest["rewritten"]),
                first_only=frozenset(nest["first_only"]),
                note=nest["note"],
                about=nest["about"],
                weights={name: (form, content) for name, form, content in nest["weights"]},
                parameters=nest["parameters"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidPayload(f"a malformed report of a slice: {error!r}") from error


def measured(
    model: nn.Module, own: Sequence[str], outputs: Mapping[str, Nest], feeding: Feeding, name: str
) -> Report:
    """Measure a slice, and try its named points.

    Args:
        model: in eval mode; all of it real but other slices' blocks. Its attention is made readable.
        outputs: path of every block -> what it returns, as `shard.output_kind` says.
        feeding: of the whole model.
    """
    device = device_of(model)
    absent = {path: model.get_submodule(path) for path in outputs if path not in own}
    with passing(absent, outputs):
        with torch.no_grad():
            readable = attention.install(model, trials(model, feeding, device))
            seen = probe(model, dict(model.named_modules()), feeding, device, readable)
        loaded = described(model, name, None, feeding, seen, verdict=Verdict(True, ""), revision="")
        found = named.search(loaded, absent) if not seen.note else named.Findings({}, {})
    return Report(
        own=tuple(own),
        manifest=replace(
            loaded.manifest,
            named={owner: dict(points) for owner, points in found.named.items()},
            refused={owner: dict(reasons) for owner, reasons in found.refused.items()},
        ),
        order=tuple(seen.order),
        rewritten=seen.rewritten,
        first_only=seen.first_only,
        note=seen.note,
        about=describe.about(model),
        weights=describe.weight_marks(model),
        parameters=sum(param.numel() for param in model.parameters()),
    )


# -- blocks that aren't there ------------------------------------------------------------------------------------


@contextmanager
def passing(blocks: Mapping[str, nn.Module], outputs: Mapping[str, Nest]) -> Iterator[None]:
    """Inside, these blocks hand on their hidden states. Their modules and attributes are there, and aren't used."""
    places = {path: index for index, path in enumerate(outputs)}
    try:
        for path, block in blocks.items():
            block.forward = _instead(block, outputs[path], _layer(block, places[path]))
        yield
    finally:
        for block in blocks.values():
            vars(block).pop("forward", None)


def _instead(block: nn.Module, kind: Nest, layer: int) -> Any:
    first = first_parameter(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs[first]
        for value in (*args, *kwargs.values()):
            if is_cache(value):
                _grow(value, layer, hidden)
        made = hidden.to(
            hidden_dtype(kind) or hidden.dtype, copy=True
        )  # a block writes over what it makes, not over what it is given
        if isinstance(kind, str):
            return made
        return (made, *(None if part is None else hidden.new_zeros(0) for part in kind[1:]))

    return forward


def _layer(block: nn.Module, place: int) -> int:
    """The number under which a block keeps what it remembers in a cache."""
    told = {getattr(module, "layer_idx", None) for module in block.modules()}
    numbers = [number for number in told if isinstance(number, int)]
    return numbers[0] if len(numbers) == 1 else place


def _grow(cache: Any, layer: int, hidden: Tensor) -> None:
    """Have a layer's keys and values be as long as the block would have them; of what, nobody asks."""
    if layer < len(cache.layers) and not isinstance(cache.layers[layer], CacheLayerMixin):
        return
    nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
    cache.update(nothing, nothing, layer)


# -- feeding, on its way to a slice ------------------------------------------------------------------------------


def feeding_nest(feeding: Feeding) -> Nest:
    """How the whole model is fed, as it travels."""
    plain = {field.name: getattr(feeding, field.name) for field in fields(Feeding)}
    return {**plain, "accepts": sorted(feeding.accepts), "inputs": encode_inputs(feeding.inputs)}


def feeding_of(nest: Nest) -> Feeding:
    """Raises InvalidPayload."""
    try:
        return Feeding(**{**nest, "accepts": frozenset(nest["accepts"]), "inputs": decode_inputs(nest["inputs"])})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidPayload(f"a malformed feeding: {error!r}") from error
