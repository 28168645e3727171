"""What a model's modules do, measured on a few tiny real runs: order of events, layouts of points, the blocks.

Real ones, as meta and fake tensors fail on common models. Two styles of call: plain, and padded with positions
stated; what changes its layout between them can't be attributed to rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..graph.functions import call_of
from ..graph.manifest import ATTENTION, BATCH, IMAGE, KEY, POINT, SEQ, Layout, Leaf, ModuleInfo, Param, leaves
from ..graph.values import DTYPES
from . import neighbours, nests
from .attention import READABLE
from .feeding import examples, places
from .functions import Made, watchable
from .hooks import Onlooker, hooked
from .inputs import Feeding, ModelInputs, positions
from .layouts import Seen, Size, derive, dtype_name, observe
from .pieces import Piece, joined

SIZES = ((2, 5), (3, 5), (2, 7))
"""Rows and positions of the runs. Constants, rows, positions and their product vary differently over them."""

IMAGES = ((2, 5, (2, 1)), (3, 5, (1, 2, 1)), (2, 7, (1, 2)))
"""Rows, positions beside those of images, and images of each row: their numbers vary as nothing else does."""

PAST = 2
"""Positions before the decode step: few, so that no sliding window ends between them."""

_KEYS = {"scores": -1, "pattern": -1, "k_rot": -2, "v": -2}
"""Attention points -> their dimension of key length, for models that can't decode and so can't show it."""


@dataclass(frozen=True)
class Measured:
    """Attributes:
    modules: path -> module, in tree order.
    blocks: paths of the blocks that carry the residual stream.
    towers: every list of such blocks by the list's path, if there are several.
    rewritten: (path, event) where the model later writes over what it handed out.
    first_only: modules whose forward calls other functions in a generation's later steps.
    attention: what `Manifest.attention` says.
    note: why nothing could be measured, or "".
    order: the events of one forward, (path, event) each; their places in it are the manifest's moments.
    """

    modules: Mapping[str, ModuleInfo]
    blocks: tuple[str, ...] = ()
    attention: str = ""
    note: str = ""
    rewritten: frozenset[tuple[str, str]] = frozenset()
    first_only: frozenset[str] = frozenset()
    towers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    order: Sequence[tuple[str, str]] = ()


@dataclass
class _Recorder(Onlooker):
    """Notes when it was called, the shapes of what it was shown, and each tensor's version."""

    attention: bool
    order: list[tuple[str, str]] = field(default_factory=list)
    seen: dict[tuple[str, str], list[Seen]] = field(default_factory=dict)
    shown: list[tuple[tuple[str, str], torch.Tensor, int]] = field(default_factory=list)
    made: dict[tuple[str, int], list[str]] = field(default_factory=dict)

    def visit(self, module: str, event: str, call: int, value: Any) -> Any:
        function = call_of(event)
        if function is not None and event.endswith(".output"):
            self.made.setdefault((module, call), []).append(function)
        self.order.append((module, event))
        self.seen.setdefault((module, event), []).append(observe(value))
        self.shown += [((module, event), tensor, tensor._version) for _, tensor in nests.tensors(value)]
        return value


@dataclass
class Watch:
    """What some runs of a model showed of its modules.

    Attributes:
        samples: (path, event) -> each value seen there, and the size of its run.
        rewritten: (path, event) where the model later writes over what it handed out.
        made: the functions that modules' own forwards called.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    samples: dict[tuple[str, str], list[tuple[Size, Seen]]] = field(default_factory=dict)
    rewritten: set[tuple[str, str]] = field(default_factory=set)
    made: Made = field(default_factory=Made)

    def record(
        self, size: Size, kwargs: Mapping[str, Any], args: Sequence[Any] = (), *, attention: bool = False
    ) -> tuple[_Recorder, Any]:
        """One run: the order of events it showed, and the model's output."""
        names = {module: path for path, module in self.modules.items()}
        recorder = _Recorder(attention)
        watched = {path: None for path, module in self.modules.items() if watchable(module)}
        with hooked(self.modules, names, recorder, watched):
            output = self.model(*args, **kwargs)
        entered = Counter(path for path, event in recorder.order if event == "enter")
        self.made.add(recorder.made, entered, later=size.decoding)
        self.rewritten |= {place for place, tensor, version in recorder.shown if tensor._version != version}
        recorder.shown.clear()
        for place, values in recorder.seen.items():
            # Layouts of ordinary points are those of the default attention; a run that looks changes some.
            if attention == (place[1] in ATTENTION):
                self.samples.setdefault(place, []).extend((size, seen) for seen in values)
        return recorder, output

    def described(self, order: Sequence[tuple[str, str]]) -> dict[str, ModuleInfo]:
        """Every module, its events in the order of one run."""
        order = self.ordered(order)
        for path in self.made.first_only():
            for event in [event for at, event in self.samples if at == path and call_of(event)]:
                kept = [(size, seen) for size, seen in self.samples[path, event] if not size.decoding]
                self.samples[path, event] = kept
        return dict(_described(described_bare(self.modules), order, self.samples))

    def ordered(self, order: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The events of a run without calls of functions that other runs don't make alike."""
        offered = self.made.offered()
        return [(path, event) for path, event in order if call_of(event) in (None, *offered.get(path, ()))]


@dataclass
class _Prober:
    watch: Watch
    feeding: Feeding
    device: torch.device

    def forward(
        self,
        batch: int,
        seq: int,
        images: Sequence[int] | None = None,
        *,
        padded: bool = False,
        attention: bool = False,
    ) -> _Recorder:
        """One run; `images` of each row, where the model sees any, whose places come to the positions."""
        feeding = self.feeding
        if images is not None:
            seq += max(images) * places(self.watch.model, feeding)
        lengths = [seq - row if padded else seq for row in range(batch)]
        pieces = examples(self.watch.model, feeding, lengths, images)
        inputs = joined([pieces], feeding.inputs, self.device)
        size = Size(batch, seq, seq, len(inputs.tensors.get(feeding.images, ())))
        kwargs: dict[str, Any] = feeding.kwargs(inputs)
        if "use_cache" in feeding.accepts:
            kwargs["use_cache"] = False  # as the engine's
        return self.watch.record(size, kwargs, attention=attention)[0]

    def runs(self, *, attention: bool = False) -> _Recorder:
        """Every kind of forward; returns the one that comes by most modules."""
        required = any(one.required for one in self.feeding.inputs.values())
        last = None
        if not required or not self.feeding.images:
            sizes = (*SIZES, *SIZES) if self.feeding.ids and not attention else SIZES
            for index, size in enumerate(sizes):
                padded = index >= len(SIZES)
                found = self.forward(*size, padded=padded, attention=attention)
                last = last if padded else found
        if self.feeding.image_token is not None or self.feeding.images:
            last = self._seeing(last, attention=attention)
        assert last is not None
        return last

    def _seeing(self, plain: _Recorder | None, *, attention: bool) -> _Recorder:
        last = [self.forward(*size, attention=attention) for size in IMAGES][-1]
        for size in () if attention else IMAGES:
            self.forward(*size, padded=True)
        if plain is not None and not _within(plain.order, last.order):
            raise ValueError("it calls its modules in another order where there are images")
        return last

    def decode(self, *, attention: bool = False) -> None:
        """One step with a cache, where query and key lengths differ. Nothing for models without a cache."""
        batch = 3
        pieces = examples(self.watch.model, self.feeding, [PAST + 1] * batch)
        if pieces[0].tensors:
            return
        rows = [list(piece.rows[0]) for piece in pieces]
        before = joined([[Piece([row[:PAST]]) for row in rows]], {}, self.device)
        kwargs: dict[str, Any] = self.feeding.kwargs(before) | {"use_cache": True}
        _, output = self.watch.record(Size(batch, PAST, PAST), kwargs, attention=attention)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return
        mask = torch.ones((batch, PAST + 1), dtype=torch.int64, device=self.device)
        ids = torch.tensor([row[PAST:] for row in rows], device=self.device)
        last = ModelInputs(ids, mask, positions(mask)[:, PAST:], (1,), (batch,), padded=True)
        kwargs = self.feeding.kwargs(last) | {"past_key_values": cache, "use_cache": True}
        self.watch.record(Size(batch, 1, PAST + 1), kwargs, attention=attention)


@torch.no_grad()
def probe(
    model: nn.Module, modules: Mapping[str, nn.Module], feeding: Feeding, device: torch.device, attention: str
) -> Measured:
    """Run the model and describe every module.

    Args:
        model: in eval mode, its attention installed.
        modules: path -> module, "" first.
        attention: what `attention.install` said.
    """
    if not feeding.works:
        return Measured(described_bare(modules), attention=attention, note=feeding.note)
    watch = Watch(model, modules)
    prober = _Prober(watch, feeding, device)
    try:
        plain = prober.runs()
        caches = {"past_key_values", "use_cache"} <= feeding.accepts
        if caches:
            prober.decode()
        looking = None
        if attention == READABLE:
            looking = prober.runs(attention=True)
            if caches:
                prober.decode(attention=True)
    except Exception as error:  # noqa: BLE001 - a model's own forward may raise anything, and loading goes on
        note = f"its forward failed while being measured: {error}"
        return Measured(described_bare(modules), attention=note, note=note)
    order = plain.order
    if looking is not None:
        attention = _readable(plain, looking)
        order = looking.order if attention == READABLE else order
    found = neighbours.marked(model, modules, watch.described(order), feeding, device, attention)
    lists = _lists(found, modules)
    return Measured(
        _stand_ins(found, modules),
        _chosen(lists, found),
        attention,
        rewritten=frozenset(watch.rewritten),
        first_only=watch.made.first_only(),
        towers=lists if len(lists) > 1 else {},
        order=watch.ordered(order),
    )


def described_bare(modules: Mapping[str, nn.Module]) -> dict[str, ModuleInfo]:
    """What is known of modules without running them."""
    return {path: _bare(path, module) for path, module in modules.items()}


def _within(order: Sequence[tuple[str, str]], of: Sequence[tuple[str, str]]) -> bool:
    """Whether one order of events is another with some left out; calls of functions aside, which may vary."""
    rest = iter([at for at in of if not call_of(at[1])])
    return all(at in rest for at in order if not call_of(at[1]))


def _bare(path: str, module: nn.Module) -> ModuleInfo:
    own = module.named_parameters(recurse=False, remove_duplicate=False)
    params = {name: Param(tuple(value.shape), dtype_name(value)) for name, value in own}
    known = {name: param for name, param in params.items() if param.dtype in DTYPES}
    return ModuleInfo(path, type(module).__name__, params=known)


def _readable(plain: _Recorder, looking: _Recorder) -> str:
    """`READABLE`, or why there are no points inside attention."""

    def modules(run: _Recorder) -> list[tuple[str, str]]:
        return [(path, event) for path, event in run.order if event not in ATTENTION and not call_of(event)]

    if modules(looking) != modules(plain):
        # There is no order of events that serves runs which look and runs which don't.
        return "its eager form calls other modules than its default"
    if not any(event in ATTENTION for _, event in looking.order):
        return "its forward comes by no attention"
    return READABLE


def _described(
    bare: Mapping[str, ModuleInfo],
    order: Sequence[tuple[str, str]],
    samples: Mapping[tuple[str, str], Sequence[tuple[Size, Seen]]],
) -> Iterator[tuple[str, ModuleInfo]]:
    found = moments(order)
    for path, info in bare.items():
        kept = found.get(path, {})
        points = {POINT.get(event, event): _layout(event, samples[path, event]) for event in kept}
        yield path, replace(info, events=kept, points=points)


def moments(order: Sequence[tuple[str, str]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Path -> event -> its places in the order; of those events that come once a call of their module."""
    found: dict[str, dict[str, list[int]]] = {}
    for moment, (path, event) in enumerate(order):
        found.setdefault(path, {}).setdefault(event, []).append(moment)
    return {
        path: {event: tuple(at) for event, at in events.items() if len(at) == len(events.get("enter", ()))}
        for path, events in found.items()
    }


def _layout(event: str, samples: Sequence[tuple[Size, Seen]]) -> Layout:
    layout = derive(samples)
    at = _KEYS.get(event)
    if at is None or not isinstance(layout, Leaf) or any(size.decoding for size, _ in samples):
        return layout
    dims = list(layout.dims)
    dims[at] = KEY if dims[at] == SEQ else dims[at]
    return Leaf(tuple(dims), layout.dtype)


def _stand_ins(found: Mapping[str, ModuleInfo], modules: Mapping[str, nn.Module]) -> dict[str, ModuleInfo]:
    """Attention's dropout modules that the library applies as a function and never calls stand for the pattern."""
    result = dict(found)
    for path, info in found.items():
        parent = path.rpartition(".")[0]
        uncalled = isinstance(modules[path], nn.Dropout) and not info.events
        if uncalled and parent in found and "pattern" in found[parent].points:
            result[path] = replace(info, stands_for=(parent, "pattern"))
    return result


def _lists(found: Mapping[str, ModuleInfo], modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Lists of modules that follow one another, each from hidden states to hidden states; none within another."""
    lists: dict[str, tuple[str, ...]] = {}
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{other}.") for other in lists):
            items = tuple(f"{path}.{name}" if path else name for name, _ in module.named_children())
            if items and _stream(found, items):
                lists[path] = items
    return lists


def _chosen(lists: Mapping[str, tuple[str, ...]], found: Mapping[str, ModuleInfo]) -> tuple[str, ...]:
    """The list that `layers` means: the longest, of one kind of input; of a model that writes, those that do.

    None where a model has one list for texts and one for images, and nothing that says which is meant.
    """
    kinds: dict[bool, tuple[str, ...]] = {}
    for items in lists.values():
        hidden = _hidden(found[items[0]], "output") or ()
        text = SEQ in hidden
        if len(items) > len(kinds.get(text, ())):
            kinds[text] = items
    if len(kinds) < 2:
        return next(iter(kinds.values()), ())
    output = found[""].points.get("output")
    logits = output.get("logits") if isinstance(output, dict) else None
    writes = isinstance(logits, Leaf) and SEQ in logits.dims
    return kinds[True] if writes else ()


def _stream(found: Mapping[str, ModuleInfo], items: Sequence[str]) -> bool:
    infos = [found.get(item) for item in items]
    hidden = [_hidden(info, "output") for info in infos if info is not None]
    if len(hidden) != len(items) or None in hidden or len(set(hidden)) > 1:
        return False
    if any(info is not None and _hidden(info, "inputs") not in hidden for info in infos):
        return False
    spans = [(info.events["enter"][0], info.events["exit"][0]) for info in infos if info is not None]
    return all(one[1] < other[0] for one, other in pairwise(spans))


def _hidden(info: ModuleInfo, point: str) -> tuple[int | str, ...] | None:
    """Dimensions of the hidden states that come first in a point: [batch, seq, hidden], [images, patches, hidden].

    Their dtype may change on the way: some models carry the stream in float32 beside half-precision weights.
    """
    first = next(iter(leaves(info.points.get(point))), None)
    fits = first is not None and len(first.dims) == 3 and _places(first.dims)
    return first.dims if first is not None and fits else None


def _places(dims: tuple[int | str, ...]) -> bool:
    """Whether two dimensions count rows and their positions, or images and their patches."""
    return dims[:2] == (BATCH, SEQ) or (dims[0] in (BATCH, IMAGE) and isinstance(dims[1], int))
