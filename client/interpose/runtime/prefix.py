"""The first tokens that several runs have in common, computed once: later runs begin behind them, on their keys and
values.

Only for models whose cache keeps every position, where a short batch shows that it comes to the same, and for runs
that leave those positions alone. What such a run reads is whole all the same: the first positions come from the run
that computed them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..graph.functions import call_of
from ..graph.manifest import EVENT, POINT, SEQ, Layout, Leaf, Manifest, leaf_paths, walk
from ..graph.model import Key, Node
from . import caches, nests
from .feeding import examples
from .inputs import ModelInputs, positions, principal
from .loading import Loaded
from .pieces import Piece, joined
from .plan import Place, Plan
from .restart import batched, part_of, plain
from .rows import Span
from .slots import Touched
from .tail import CLOSE, Tail, spread

if TYPE_CHECKING:
    from .stages import Rows

log = logging.getLogger(__name__)

Parts = Mapping[tuple[Key, ...], Tensor]
"""Tensors of a nest, by path."""


@dataclass(frozen=True)
class Past:
    """What some rows' first positions made.

    Attributes:
        layers: keys and values, [rows, heads, positions, size].
        made: what other runs look at.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    made: Mapping[Place, Parts]


class _Behind(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of first positions. What comes is put behind them and not kept, as nobody comes again."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


@dataclass
class Extended(Touched):
    """The same with the first positions, which this forward didn't compute, before it."""

    first: Parts = field(default_factory=dict)

    def tensor(self, path: tuple[Key, ...]) -> Tensor:
        if path in self.owned:
            return self.owned[path]
        if path not in self._copies:
            pair = self.first[path], super().tensor(path)
            self._copies[path] = torch.cat(pair, _position(self.layout, path))
        return self._copies[path]

    def result(self) -> Any:
        nest = self.nest
        for path, tensor in self.owned.items():
            first, dim = self.first[path], _position(self.layout, path)
            size = first.shape[dim]
            begin = tensor.narrow(dim, 0, size)
            if not bool(((begin == first) | (begin.isnan() & first.isnan())).all()):
                raise RuntimeError("a run wrote where it was thought to leave the positions alone")
            rest = tensor.narrow(dim, size, tensor.shape[dim] - size)
            nest = nests.put(nest, path, rest.clone())
        return nest


def _position(layout: Layout, path: tuple[Key, ...]) -> int:
    leaf = walk(layout, path)
    assert isinstance(leaf, Leaf)
    return leaf.dims.index(SEQ)


@dataclass
class Prefix:
    """Whether and how runs of one model can begin behind tokens that were computed before."""

    loaded: Loaded
    tail: Tail | None

    @cached_property
    def works(self) -> bool:
        """Whether a padded batch comes out the same behind five tokens of another run."""
        feeding = self.loaded.feeding
        if self.tail is None or not {"past_key_values", "use_cache"} <= feeding.accepts or feeding.inputs:
            return False
        one, other = (piece.rows[0] for piece in examples(self.loaded.model, feeding, [9, 8]))
        runs = [[Piece([[*one[:5], *other[5:]]])], [Piece([one])]]
        model: Any = self.loaded.model
        try:
            cache = self.cache()
            model(**feeding.kwargs(joined([[Piece([one])]], {}, self.loaded.device)), **cache)
            past = self.kept(cache["past_key_values"], Span.whole(1, 9, 9), 5, {})
            expected = principal(model(**feeding.kwargs(joined(runs, {}, self.loaded.device))))
            short = joined([[behind(piece, 5) for piece in run] for run in runs], {}, self.loaded.device)
            found = principal(model(**feeding.kwargs(self.behind(short, 5)), **self.begin([past] * 2)))
        except Exception as error:  # noqa: BLE001 - a model that can't may raise anything; it runs whole
            log.info("%s can't go on behind tokens: %s", self.loaded.manifest.model, error)
            return False
        pairs = [(found[0, :3], expected[0, 5:8]), (found[1, :4], expected[1, 5:9])]
        tolerance = CLOSE.get(expected.dtype, 3e-2)
        return all(float((a - b).abs().max()) <= tolerance * float(b.abs().max()) for a, b in pairs)

    def cache(self) -> dict[str, Any]:
        """Arguments by which a forward keeps its keys and values."""
        config: Any = self.loaded.model.config
        return {"past_key_values": DynamicCache(config=config), "use_cache": True}

    def kept(self, cache: Any, span: Span, size: int, made: Mapping[Place, Parts]) -> Past:
        """What a forward kept of the first positions of some rows. RuntimeError if it kept something else."""
        if not caches.flexible(cache):
            raise RuntimeError("the cache doesn't keep every position")
        rows = slice(span.row, span.row + span.rows)
        layers = [(_of(layer.keys, rows, size), _of(layer.values, rows, size)) for layer in caches.layers_of(cache)]
        return Past(layers, made)

    def begin(self, pasts: Sequence[Past]) -> dict[str, Any]:
        """Arguments by which a forward begins behind them, each of which comes before its own rows."""
        cache = DynamicCache()
        cache.layers = [
            _Behind(*(torch.cat([past.layers[index][which] for past in pasts]) for which in (0, 1)))
            for index in range(len(pasts[0].layers))
        ]
        return {"past_key_values": cache, "use_cache": True}

    def behind(self, inputs: ModelInputs, size: int) -> ModelInputs:
        """Inputs that come behind so many tokens of each row."""
        mask = inputs.attention_mask
        whole = torch.cat([mask.new_ones(len(mask), size), mask], -1)
        return replace(inputs, attention_mask=whole, position_ids=positions(whole)[:, size:], padded=True)

    def first(self, pasts: Sequence[Past], spans: Sequence[Span], whole: Span) -> dict[Place, Parts]:
        """What was made at each place, as a batch; zeros for rows whose runs don't look there."""
        found: dict[Place, Parts] = {}
        for place in dict.fromkeys(place for past in pasts for place in past.made):
            there = [(past.made.get(place, {}), span) for past, span in zip(pasts, spans, strict=True)]
            made: dict[tuple[Key, ...], Tensor] = {}
            for path in dict.fromkeys(path for parts, _ in there for path in parts):
                leaf = walk(layout_of(self.loaded.manifest, place), path)
                assert isinstance(leaf, Leaf)
                own = [(parts[path], span) for parts, span in there if path in parts]
                made[path] = batched([part for part, _ in own], leaf, [span for _, span in own], whole)
            found[place] = made
        return found

    def clear(self, plan: Plan, run: int) -> int:
        """How many of its first positions a run leaves alone; 0 if what it touches can't be divided."""
        own = plan.graph.runs[run]
        lengths = {len(row) for invoke in own.invokes for row in invoke.rows}
        manifest = self.loaded.manifest
        if own.given or len(lengths) != 1 or plan.attention(run) or not self._plain(plan, run):
            return 0
        (length,) = lengths
        written = [
            _first(node, _leaf(manifest, place, node), length)
            for place, nodes in plan.at(run, 0).items()
            for node in nodes
            if node.op == "write"
        ]
        return min([*written, length - 1])

    def _plain(self, plan: Plan, run: int) -> bool:
        """Whether all that a run touches can be put together of two parts of its positions."""
        assert self.tail is not None
        if self.tail.last_only(plan, run) is None:
            return False
        for place, nodes in plan.at(run, 0).items():
            if self.tail.touches(place):
                continue
            if call_of(place[1]) or (place[1] == EVENT["stream"] and any(node.op == "write" for node in nodes)):
                return False
            if self.loaded.manifest.moment(*place) is None:
                return False
            if not all(map(_divisible, _leaves(self.loaded.manifest, place, nodes).values())):
                return False
        return True

    def wanted(self, plans: Iterable[tuple[Plan, int]]) -> dict[Place, dict[tuple[Key, ...], Leaf]]:
        """What runs touch in a forward, but for last logits: place -> path -> layout."""
        assert self.tail is not None
        found: dict[Place, dict[tuple[Key, ...], Leaf]] = {}
        for plan, run in plans:
            for place, nodes in plan.at(run, 0).items():
                if not self.tail.touches(place):
                    found.setdefault(place, {}).update(_leaves(self.loaded.manifest, place, nodes))
        return found


class Keeping:
    """A forward that keeps what its rows' first positions make.

    Args:
        spans: of rows that others begin behind, in the forward's batch.
        size: how many positions.
    """

    def __init__(self, prefix: Prefix, spans: Mapping[Rows, Span], size: int) -> None:
        self.arguments = prefix.cache()
        self._prefix = prefix
        self._size = size
        self._spans = spans
        self._made: dict[Rows, dict[Place, Parts]] = {rows: {} for rows in spans}
        self._wanted = {rows: prefix.wanted((job.plan, run) for job, run in rows.behind) for rows in spans}

    @property
    def places(self) -> dict[Place, Callable[[Any], None]]:
        """Where it looks. The last block's output among them: then all keys and values are there."""
        last = (self._prefix.loaded.manifest.blocks[-1], "exit", 0)
        return {place: partial(self._see, place) for place in [last, *chain(*self._wanted.values())]}

    def _see(self, place: Place, nest: Any) -> None:
        for rows, span in self._spans.items():
            first = replace(span, length=self._size)
            leaves = self._wanted[rows].get(place, {})
            self._made[rows][place] = {
                path: part_of(nests.at(nest, path), leaf, first).clone() for path, leaf in leaves.items()
            }

    def pasts(self) -> dict[Rows, Past]:
        cache = self.arguments["past_key_values"]
        return {
            rows: self._prefix.kept(cache, span, self._size, self._made[rows]) for rows, span in self._spans.items()
        }


def behind(piece: Piece, size: int) -> Piece:
    """A piece without its rows' first tokens."""
    return replace(piece, rows=[row[size:] for row in piece.rows])


def _of(value: Any, rows: slice, size: int) -> Tensor:
    part: Tensor = value[rows, :, :size]
    return part


def layout_of(manifest: Manifest, place: Place) -> Layout:
    """Of what is seen at a place."""
    return manifest.modules[place[0]].points[POINT.get(place[1], place[1])]


def _leaf(manifest: Manifest, place: Place, node: Node) -> Leaf:
    assert node.point is not None
    leaf = walk(layout_of(manifest, place), node.point.path)
    assert isinstance(leaf, Leaf)
    return leaf


def _leaves(manifest: Manifest, place: Place, nodes: Sequence[Node]) -> dict[tuple[Key, ...], Leaf]:
    found: dict[tuple[Key, ...], Leaf] = {}
    for node in nodes:
        assert node.point is not None
        found.update(leaf_paths(walk(layout_of(manifest, place), node.point.path), node.point.path))
    return found


def _divisible(leaf: Leaf) -> bool:
    return plain(leaf) and SEQ in leaf.dims


def _first(node: Node, leaf: Leaf, length: int) -> int:
    """The first position that a write may change, of so many."""
    chain, index = node.args[:2]
    if len(chain) == 1 and chain[0][0] == "getitem":
        index = chain[0][1]  # as `x[:, -1] *= 2` writes: whatever is written lies in that
    elif chain or index is None:
        return 0
    items = spread(index if isinstance(index, tuple) else (index,), len(leaf.dims))
    if items is None:
        return 0
    item = items[leaf.dims.index(SEQ)]
    if type(item) is int and -length <= item < length:
        return item % length
    if isinstance(item, slice) and {int, type(None)} >= {type(item.start), type(item.stop), type(item.step)}:
        return min(range(*item.indices(length)), default=length)
    return 0
