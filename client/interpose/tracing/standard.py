"""Standard names in the language: `model.layers[3].resid_mid`, `model.logits`, and other libraries' spellings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import BadArgument, IndexOutOfRange, ShapeUnknown, UnknownPoint
from ..graph.manifest import Manifest
from ..graph.model import Point
from ..graph.named import BLOCK, LENS, MODEL, ROWS, SERIES, Named, View, perform, refusal, sized, spelled
from ..graph.values import Ref
from .recorder import Recorder

if TYPE_CHECKING:
    from .handles import Module

LAYERS = "layers"

_ALSO = {"token_embeddings": "embed"}
"""nnterp's names of the model's own values."""


@dataclass(frozen=True, slots=True)
class Place:
    """A named point of one owner, seen through further views."""

    owner: str
    name: str
    named: Named
    views: tuple[View, ...] = ()


def find(manifest: Manifest, owner: str, name: str) -> Place | None:
    """The named point an owner has under a name or another library's spelling of it; None if it is no such name.

    Raises UnknownPoint with the reason, if the model's family has no such value.
    """
    views: tuple[View, ...] = ()
    if not owner and ("." in name or name.startswith("hook_") or name == "unembed"):
        meant = spelled(name)
        if meant is not None:
            owner, name, views = _owner(manifest, meant.block, name), meant.name, meant.views
    name = _ALSO.get(name, name) if not owner else name
    found = manifest.named.get(owner, {}).get(name)
    if found is not None:
        return Place(owner, name, found, views)
    if name in (BLOCK if owner in manifest.stream else () if owner else MODEL):
        reason = refusal(manifest.refused, owner, name) or "nothing is known of this model's inside"
        raise UnknownPoint(f"{owner or manifest.model} has no {name}: {reason}")
    return None


def _owner(manifest: Manifest, block: int | None, text: str) -> str:
    if block is None:
        return ""
    if block >= len(manifest.blocks):
        raise UnknownPoint(f"{text}: {manifest.model} has {len(manifest.blocks)} blocks")
    return manifest.blocks[block]


def names(manifest: Manifest, owner: str) -> list[str]:
    """The standard names an owner offers."""
    return list(manifest.named.get(owner, {}))


def every(manifest: Manifest) -> Iterator[str]:
    """All standard names as strings of the whole model: "logits", "blocks.3.resid_post"."""
    yield from names(manifest, "")
    for index, path in enumerate(manifest.blocks):
        yield from (f"blocks.{index}.{name}" for name in names(manifest, path))


def lens(manifest: Manifest) -> Iterator[str]:
    """TransformerLens's strings for what there is here: "blocks.3.hook_resid_post"."""
    for name, (ours, _) in LENS.items():
        for index, path in enumerate(manifest.blocks):
            if ours in manifest.named.get(path, {}):
                yield f"blocks.{index}.{name}"


def read(recorder: Recorder, place: Place) -> Any:
    """The value at a named point, for the current invoke."""
    _check_offered(recorder, place)
    if place.named.plain:
        value = _through(recorder, place.named.point, place.named.views)
        value._root.views = value._chain
    else:
        base = _base(recorder, place)
        value = recorder.make(recorder, base, (), base.node())
    return _seen(recorder, value, place.views)


def replace(recorder: Recorder, place: Place, value: Any) -> None:
    """Put another value at a named point."""
    _check_offered(recorder, place)
    if place.named.plain:
        at = _seen(recorder, _through(recorder, place.named.point, place.named.views), place.views)
        recorder.points.replace(place.named.point, value, at._chain)
        return
    base = _base(recorder, place)
    if getattr(value, "_root", None) is base and not value._chain:
        return  # the second half of `block.head_out *= y`, which has been written already
    given = recorder.arg(value)
    if not isinstance(given, Ref):
        raise BadArgument(f"{place.name} is replaced by a tensor, not by {type(value).__name__}")
    old = base.node()
    recorder.standard.pop(_key(recorder, place))
    fresh = _base(recorder, place)
    fresh.write((), None, given)
    base.pinned = old


def _check_offered(recorder: Recorder, place: Place) -> None:
    """Raises UnknownPoint for a point that doesn't hold with the adapter of the current run."""
    adapter = recorder.runs[-1].adapter
    if adapter is not None:
        refused = recorder.manifest.adapters[adapter].refused.get(place.owner, {})
        if place.name in refused:
            owner = place.owner or recorder.manifest.model
            raise UnknownPoint(f"{owner} has no {place.name} with adapter {adapter}: {refused[place.name]}")


def _through(recorder: Recorder, point: Point, views: Sequence[View]) -> Any:
    return _seen(recorder, recorder.points.at(point), views)


def _seen(recorder: Recorder, value: Any, views: Sequence[View]) -> Any:
    for op, *args in sized(views, _rows(recorder, views)):
        value = recorder.op(op, (value, *args), {})
    return value


def _rows(recorder: Recorder, views: Sequence[View]) -> int:
    if not any(ROWS in part for view in views for part in view if isinstance(part, tuple)):
        return 0
    run = recorder.runs[-1]
    rows = run.rows if recorder.invoke is None else len(run.invokes[recorder.invoke].rows)
    if not rows:
        raise ShapeUnknown(
            "this model keeps rows and positions in one dimension here, and an edit has no prompt yet"
        )
    return rows


# -- what the model doesn't make itself --------------------------------------------------------------------------


def _key(recorder: Recorder, place: Place) -> Any:
    return len(recorder.runs) - 1, recorder.invoke, recorder.step, recorder.when, place.owner, place.name


def _base(recorder: Recorder, place: Place) -> NamedBase:
    key = _key(recorder, place)
    if key not in recorder.standard:
        recorder.standard[key] = NamedBase(recorder, place.name, place.named)
    found: NamedBase = recorder.standard[key]
    return found


@dataclass
class NamedBase:
    """A named point that is computed, or whose writing concerns more than its own place."""

    recorder: Recorder
    name: str
    named: Named
    pinned: int | None = None
    """The last node before it was replaced as a whole: old names keep the old value."""
    _written: int | None = None
    _places: dict[Any, Any] = field(default_factory=dict)
    _computed: tuple[Any, int] = ((), -1)

    computed = True

    def __post_init__(self) -> None:
        # Looked up now, as a later line may stand in another step.
        for steps in (self.named.steps, *(effect.steps for effect in self.named.effects)):
            for step in steps:
                if step[0] == "read":
                    self._place(Point(step[1], step[2], tuple(step[3])), tuple(step[4]))
        for effect in self.named.effects:
            self._place(effect.point, effect.views)

    def node(self) -> int:
        if self.pinned is not None:
            return self.pinned
        if self._written is not None:
            return self._written
        if not self.named.steps:
            return self.recorder.ref(self._place(self.named.point, self.named.views))
        now = tuple(self.recorder.ref(value) for value in self._places.values())
        if self._computed[0] != now:
            self._computed = now, self._perform(self.named.steps, ())
        return self._computed[1]

    def write(self, chain: tuple[View, ...], index: Any, value: Any) -> None:
        if self.pinned is not None:
            raise BadArgument(f"{self.name} was replaced since this value was read; read it again to write it")
        old = self.node()
        whole = index is None and not chain
        new = value.id if whole else self.recorder.node("update", (Ref(old), chain, index, value))
        for effect in self.named.effects:
            put = self._perform(effect.steps, (Ref(new), Ref(old)))
            target = self._place(effect.point, effect.views)
            target._root.write(target._chain, ..., Ref(put))
        # A value that comes before the place it acts on can't be told from there afterwards.
        sources = [step[1:4] for step in self.named.steps if step[0] == "read"]
        here = [(at.point.module, at.point.name, at.point.path) for at in self.named.effects]
        if sources and not any(source in here for source in sources):
            self._written = new

    def _place(self, point: Point, views: tuple[View, ...]) -> Any:
        key = repr((point, views))  # slices have no hash
        if key not in self._places:
            self._places[key] = _through(self.recorder, point, views)
        return self._places[key]

    def _perform(self, steps: Sequence[Any], given: Sequence[Ref]) -> int:
        def read(point: Point, views: tuple[View, ...]) -> Ref:
            return Ref(self.recorder.ref(self._place(point, views)))

        def op(name: str, args: tuple[Any, ...]) -> Ref:
            return Ref(self.recorder.node(name, args))

        found: Ref = perform(steps, given, read, op)
        return found.id


# -- lists of blocks ---------------------------------------------------------------------------------------------


class Blocks(Sequence[Any]):
    """`model.layers`: the model's blocks, whatever its family calls them."""

    def __init__(self, model: Module) -> None:
        self._model = model

    def __getitem__(self, index: Any) -> Any:
        paths = self._model._manifest.blocks
        try:
            found = paths[index]
        except IndexError:
            raise IndexOutOfRange(f"the model has {len(paths)} blocks; there is no layers[{index}]") from None
        if isinstance(index, slice):
            return [_handle(self._model, path) for path in found]
        return _handle(self._model, found)

    def __len__(self) -> int:
        return len(self._model._manifest.blocks)

    def __repr__(self) -> str:
        return f"<{len(self)} blocks: {', '.join(self._model._manifest.blocks[:2])}, ...>"


class Series:
    """nnterp's accessors: `model.layers_output[3]` is a named point of block 3."""

    def __init__(self, model: Module, name: str) -> None:
        self._model, self._name = model, name

    def __getitem__(self, index: int) -> Any:
        return Blocks(self._model)[index].points[self._name]

    def __setitem__(self, index: int, value: Any) -> None:
        Blocks(self._model)[index].points[self._name] = value

    def __len__(self) -> int:
        return len(self._model._manifest.blocks)


def _handle(model: Module, path: str) -> Module:
    from .handles import Module

    return Module(model._owner, path)


def attribute(model: Module, name: str) -> Any:
    """What the whole model offers under a name beyond its children and points, or None."""
    manifest = model._manifest
    if name == LAYERS and manifest.blocks:
        return Blocks(model)
    if name in (LAYERS, *SERIES) and manifest.towers and not manifest.blocks:
        raise UnknownPoint(f"{manifest.model} has several lists of blocks; say which: {', '.join(manifest.towers)}")
    if name in SERIES:
        return Series(model, SERIES[name])
    if name == "project_on_vocab":
        return Projection(model)
    if name == "next_token_probs":
        return model.points["logits"][:, -1].softmax(-1)
    return None


class Projection:
    """`model.project_on_vocab(h)`: the last norm and the unembedding, as a logit lens needs them."""

    def __init__(self, model: Module) -> None:
        roles = model._manifest.roles
        missing = [role for role in ("final_norm", "unembed") if role not in roles]
        if missing:
            reasons = [refusal(model._manifest.refused, "", role) or "" for role in missing]
            raise UnknownPoint(f"{model._manifest.model} has no {missing[0]} to project with. {reasons[0]}".strip())
        self._parts = [_handle(model, roles[role]) for role in ("final_norm", "unembed")]

    def __call__(self, value: Any) -> Any:
        for part in self._parts:
            value = part(value)
        return value
