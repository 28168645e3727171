"""What a hosted model says of itself, measured at load: modules, order, layouts, parameters, limits.

The client records, checks and draws from it without torch; the server validates every job against it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

from ..errors import InvalidGraph, UnknownModule
from .adapters import AdapterInfo, decode_adapters, encode_adapters
from .inputs import BATCH as BATCH
from .inputs import IMAGE as IMAGE
from .inputs import SEQ as SEQ
from .inputs import Input, decode_inputs, encode_inputs
from .named import Offers, Refusals, decode_named, encode_named
from .values import DTYPES, TensorSpec

KEY, BATCH_SEQ, UNKNOWN = "key", "batch*seq", "?"
DIMS = (BATCH, SEQ, KEY, BATCH_SEQ, IMAGE, UNKNOWN)

EVENT = {"output": "exit", "inputs": "enter", "stream": "stream"}
"""The event of a module's call at which a point of that name exists; other names are their own event.

"stream" is what the module is given, before "inputs", written in the memory itself: whoever else holds that
tensor, as a block holds its residual while a norm reads it, goes on with what was written. Only offered where that
is right.
"""

POINT = {event: point for point, event in EVENT.items()}
"""Event -> the point that exists at it; other events are points of their own name."""

ATTENTION = ("q_rot", "k_rot", "v", "scores", "pattern", "z")
"""Points inside an attention module, in order. A run that touches one takes the eager form of attention."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor's layout: for each dimension what it measures, or its constant size; and its dtype.

    `alone`: a row's values depend on the rows beside it, though it can be told which are whose.
    """

    dims: tuple[int | str, ...]
    dtype: str
    alone: bool = False
    by_rows: bool = field(init=False, repr=False, compare=False)
    """Whether every value in it belongs to one row, and which."""

    def __post_init__(self) -> None:
        one = sum(map(self.dims.count, (BATCH, BATCH_SEQ, IMAGE))) == 1
        object.__setattr__(self, "by_rows", one and UNKNOWN not in self.dims)

    @property
    def shared(self) -> bool:
        """Whether jobs that touch it may share a batch."""
        return self.by_rows and not self.alone

    def spec(self, batch: int, seq: int, key: int | None = None, images: int = 0) -> TensorSpec | None:
        """The tensor for so many rows, positions and images, or None if a dimension is unknown."""
        return _spec(self.dims, self.dtype, batch, seq, seq if key is None else key, images)


@lru_cache(maxsize=1024)
def _spec(
    dims: tuple[int | str, ...], dtype: str, batch: int, seq: int, key: int, images: int
) -> TensorSpec | None:
    if UNKNOWN in dims:
        return None
    sizes = {BATCH: batch, SEQ: seq, KEY: key, BATCH_SEQ: batch * seq, IMAGE: images}
    return TensorSpec(tuple([dim if isinstance(dim, int) else sizes[dim] for dim in dims]), dtype)


Layout: TypeAlias = "Leaf | tuple[Layout, ...] | dict[str, Layout] | None"
"""A nest of leaves; None stands for something that isn't a tensor."""


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a module."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModuleInfo:
    """One module.

    Attributes:
        path: dotted, "" for the model itself.
        cls: class name.
        events: event -> its moments in the measured forward, one a call; "enter", "exit" and named points.
        points: point name -> layout. "output", "inputs" = ((positional...), {keyword: ...}), and named points.
        stands_for: (module, point) whose value is read and written in place of this module's input and output,
            where the library doesn't call a module that published code reads.
    """

    path: str
    cls: str
    events: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    points: Mapping[str, Layout] = field(default_factory=dict)
    params: Mapping[str, Param] = field(default_factory=dict)
    stands_for: tuple[str, str] | None = None

    @cached_property
    def reentered(self) -> bool:
        """Whether, in the measured forward, a call of it began before the one before had ended."""
        enters, exits = self.events.get("enter", ()), self.events.get("exit", ())
        return len(enters) != len(exits) or any(
            later < over for over, later in zip(exits, enters[1:], strict=False)
        )


@dataclass(frozen=True)
class Manifest:
    """Attributes:
    model: the name it is served under.
    revision: hash of what decides results: weights, config, dtype, library versions.
    architecture: class name of the model.
    dtype: of the weights.
    modules: path -> module, in tree order; "" first.
    blocks: paths of the decoder (or encoder) blocks, in order; of a model that writes text beside images, those
        that write; none where several lists are on a par.
    towers: every list of blocks, by the path of the list, of a model with more than one.
    tokens: whether it takes token ids.
    inputs: the tensors it takes beside token ids, or in their place.
    image_token, image_tokens: the id that holds an image's place in a prompt, and how many places an image takes, 0
        where that differs; image_patches: then how many rows of pixel_values go to one place.
    even_rows: why rows of one run must be equally long, "" if they needn't: it looks at a row's first position,
        which padding on the left would move.
    vocab: token ids are below this.
    positions: most positions a row may have, None for no bound.
    attention: "interpose" if the attention inside can be read, else why not; "" where nobody looked for any.
    row_independent: whether rows of different jobs may share a forward; `row_note` says why not.
    tokenizer: SHA-256 of the tokenizer file the server hands out, None without one.
    tokenizer_config: what turns text to ids beyond that file: special tokens, chat template.
    config: figures for people: layers, heads, hidden size.
    limits: the server's limits on a job, by name.
    named: standard names of points, verified on numbers: owner (a block's path, "" for the model) -> name -> point.
    refused: owner -> standard name -> why there is no such point; what holds for every block stands under "".
    roles: "embed", "final_norm", "unembed" -> path of the module, where there is one.
    adapters: name -> weights that a run may choose to run with beside the model's own.
    windows: block -> how many positions its attention looks back on in a generation's later steps, where its cache
        lets go of older ones.
    """

    model: str
    revision: str
    architecture: str
    dtype: str
    modules: Mapping[str, ModuleInfo]
    blocks: tuple[str, ...] = ()
    vocab: int | None = None
    positions: int | None = None
    attention: str = "interpose"
    row_independent: bool = True
    row_note: str = ""
    tokenizer: str | None = None
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int | float] = field(default_factory=dict)
    named: Offers = field(default_factory=dict)
    refused: Refusals = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    windows: Mapping[str, int] = field(default_factory=dict)
    towers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: bool = True
    inputs: Mapping[str, Input] = field(default_factory=dict)
    image_token: int | None = None
    image_tokens: int = 0
    image_patches: int = 0
    even_rows: str = ""
    adapters: Mapping[str, AdapterInfo] = field(default_factory=dict)

    @cached_property
    def stream(self) -> frozenset[str]:
        """The blocks of every list."""
        return frozenset(self.blocks).union(*self.towers.values())

    def module(self, path: str) -> ModuleInfo:
        """The module at a path. Raises UnknownModule with the nearest names."""
        found = self.modules.get(path)
        if found is None:
            raise UnknownModule(f"{self.model} has no module {path!r}{self.nearest(path)}")
        return found

    def nearest(self, path: str, also: Sequence[str] = ()) -> str:
        """ "; did you mean ..." for a path that isn't there, or "". `also`: what its parent has beside modules."""
        parent, _, name = path.rpartition(".")
        siblings = self.children.get(parent, ())
        close = difflib.get_close_matches(name, [*siblings, *also], 3, 0.5)
        if not close and siblings:
            shown = ", ".join(siblings[:8]) + (", ..." if len(siblings) > 8 else "")
            return f"; {parent or 'the model'} has {shown}"
        if not close:
            close = difflib.get_close_matches(path, list(self.modules), 3, 0.6)
            return f"; did you mean {' or '.join(close)}?" if close else ""
        full = (f"{parent}.{name}" if parent else name for name in close)
        return f"; did you mean {' or '.join(full)}?"

    @cached_property
    def children(self) -> Mapping[str, tuple[str, ...]]:
        """Path -> names of its direct children, in tree order."""
        found: dict[str, list[str]] = {path: [] for path in self.modules}
        for path in self.modules:
            if path:
                parent, _, name = path.rpartition(".")
                found[parent].append(name)
        return {path: tuple(names) for path, names in found.items()}

    @cached_property
    def found(self) -> dict[tuple[str, str, int | None, bool], Any]:
        """What names in the language were found to stand for, kept by those who look them up."""
        return {}

    @cached_property
    def _weights(self) -> dict[str, int]:
        return {}

    def weights(self, path: str) -> int:
        """How many parameters a module has, with all within it."""
        if path not in self._weights:
            inside = (info for name, info in self.modules.items() if not path or f"{name}.".startswith(f"{path}."))
            self._weights[path] = sum(math.prod(param.shape) for info in inside for param in info.params.values())
        return self._weights[path]

    def moment(self, module: str, name: str, call: int) -> int | None:
        """When a point exists within a forward; None if the measured forward never came there."""
        info = self.modules.get(module)
        moments = info.events.get(EVENT.get(name, name), ()) if info else ()
        if call >= len(moments):
            return None
        # What is written into memory itself comes before the module is shown its input, at one event.
        return 2 * moments[call] - (name == "stream")

    def window(self, module: str) -> int | None:
        """The window of the block that a module is or lies in; None if it has none."""
        inside = (size for block, size in self.windows.items() if f"{module}.".startswith(f"{block}."))
        return next(inside, None)


def walk(layout: Layout, path: tuple[int | str, ...]) -> Layout:
    """The part of a layout at a path. Raises KeyError if the path leads nowhere."""
    for key in path:
        if isinstance(layout, tuple) and type(key) is int and -len(layout) <= key < len(layout):
            layout = layout[key]
        elif isinstance(layout, dict) and key in layout:
            layout = layout[str(key)]
        else:
            raise KeyError(key)
    return layout


def leaves(layout: Layout) -> list[Leaf]:
    """All tensors of a layout, in order."""
    if isinstance(layout, Leaf):
        return [layout]
    if isinstance(layout, tuple):
        return [leaf for item in layout for leaf in leaves(item)]
    if isinstance(layout, dict):
        return [leaf for item in layout.values() for leaf in leaves(item)]
    return []


def first_input(inputs: Layout) -> tuple[int | str, ...] | None:
    """Path of the first argument in what a module or a function is given, by position or by name; None without."""
    if not isinstance(inputs, tuple) or len(inputs) != 2:
        return None
    args, kwargs = inputs
    if isinstance(args, tuple) and args:
        return 0, 0
    named = kwargs.items() if isinstance(kwargs, dict) else ()
    return next(((1, name) for name, layout in named if leaves(layout)), None)


def leaf_paths(layout: Layout, path: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], Leaf]]:
    """All tensors of a layout with their paths, in order."""
    if isinstance(layout, Leaf):
        yield path, layout
    items = layout.items() if isinstance(layout, dict) else enumerate(layout) if isinstance(layout, tuple) else ()
    for key, item in items:
        yield from leaf_paths(item, (*path, key))


def encode_layout(layout: Layout) -> Any:
    """The plain form."""
    if isinstance(layout, Leaf):
        plain = {"dtype": layout.dtype, "dims": list(layout.dims)}
        return plain | {"alone": True} if layout.alone else plain
    if isinstance(layout, tuple):
        return [encode_layout(item) for item in layout]
    if isinstance(layout, dict):
        return {"fields": {name: encode_layout(item) for name, item in layout.items()}}
    return None


def decode_layout(plain: Any, depth: int = 0) -> Layout:
    """Raises InvalidGraph if malformed: a client doesn't trust a server's manifest either."""
    if depth > 8:
        raise InvalidGraph("a manifest's layout nests too deep")
    if plain is None:
        return None
    if isinstance(plain, list):
        return tuple(decode_layout(item, depth + 1) for item in plain)
    if isinstance(plain, dict) and isinstance(plain.get("fields"), dict):
        return {str(name): decode_layout(item, depth + 1) for name, item in plain["fields"].items()}
    if isinstance(plain, dict) and plain.get("dtype") in DTYPES and isinstance(plain.get("dims"), list):
        dims = tuple(plain["dims"])
        if all(dim in DIMS or (type(dim) is int and dim >= 0) for dim in dims):
            return Leaf(dims, plain["dtype"], alone=plain.get("alone") is True)
    raise InvalidGraph("a manifest's layout is malformed")


def encode_manifest(manifest: Manifest) -> dict[str, Any]:
    """The plain form; equal layouts are stored once, as blocks repeat them."""
    table: dict[str, int] = {}

    def store(layout: Layout) -> int:
        return table.setdefault(json.dumps(encode_layout(layout), sort_keys=False), len(table))

    modules = [
        {
            "path": info.path,
            "cls": info.cls,
            "events": {name: list(moments) for name, moments in info.events.items()},
            "points": {name: store(layout) for name, layout in info.points.items()},
            "params": {name: [list(param.shape), param.dtype] for name, param in info.params.items()},
            "stands_for": list(info.stands_for) if info.stands_for else None,
        }
        for info in manifest.modules.values()
    ]
    plain = {name: getattr(manifest, name) for name in _PLAIN}
    return {
        **plain,
        "blocks": list(manifest.blocks),
        "modules": modules,
        "layouts": [json.loads(layout) for layout in table],
        "named": encode_named(manifest.named),
        "towers": {path: list(blocks) for path, blocks in manifest.towers.items()},
        "inputs": encode_inputs(manifest.inputs),
        "adapters": encode_adapters(manifest.adapters),
    }


_PLAIN = (
    *("model", "revision", "architecture", "dtype", "vocab", "positions", "attention", "row_independent"),
    *("row_note", "tokenizer", "tokenizer_config", "config", "versions", "limits"),
    *("refused", "roles", "windows", "tokens", "image_token", "image_tokens", "image_patches", "even_rows"),
)


def decode_manifest(plain: Mapping[str, Any]) -> Manifest:
    """Raises InvalidGraph if malformed."""
    try:
        layouts = [decode_layout(layout) for layout in plain["layouts"]]
        modules = {
            entry["path"]: ModuleInfo(
                path=entry["path"],
                cls=entry["cls"],
                events={name: tuple(moments) for name, moments in entry["events"].items()},
                points={name: layouts[index] for name, index in entry["points"].items()},
                params={name: Param(tuple(shape), dtype) for name, (shape, dtype) in entry["params"].items()},
                stands_for=tuple(entry["stands_for"]) if entry["stands_for"] else None,
            )
            for entry in plain["modules"]
        }
        found = Manifest(
            **{name: plain[name] for name in _PLAIN},
            blocks=tuple(plain["blocks"]),
            modules=modules,
            named=decode_named(plain["named"]),
            towers={path: tuple(blocks) for path, blocks in plain["towers"].items()},
            inputs=decode_inputs(plain["inputs"]),
            adapters=decode_adapters(plain.get("adapters", {})),  # older servers have none
        )
        if "" not in found.children or not found.stream <= set(modules):  # children: parents all exist
            raise ValueError("blocks that are no modules")
        return found
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InvalidGraph(f"a malformed manifest: {error!r}") from error


def fingerprint(manifest: Manifest) -> str:
    """SHA-256 of the plain form: the key under which a client caches it."""
    plain = json.dumps(encode_manifest(manifest), sort_keys=True, default=str)
    return hashlib.sha256(plain.encode()).hexdigest()
