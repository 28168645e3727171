"""The text of `print(model)`: the module tree with parameters and output shapes, equal neighbours folded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from .graph.functions import call_of, calls
from .graph.manifest import EVENT, Layout, Leaf, Manifest, ModuleInfo
from .graph.named_dims import leaf


@dataclass(frozen=True)
class _Line:
    """One line of the drawing, in three columns."""

    label: str
    params: str = ""
    output: str = ""


@dataclass
class _Fold:
    """Neighbours that look the same inside: a run of blocks, or a single module."""

    paths: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        first, last = (path.rpartition(".")[2] for path in (self.paths[0], self.paths[-1]))
        return first if first == last else f"{first}-{last}"


def draw(manifest: Manifest, path: str = "") -> str:
    """The model, or the part of it at `path`, as a tree: a module a line, under the names that address it.

    Parameters stand in the second column, the output's shape in the third; a dtype is named where it isn't the
    model's. Named points stand on lines of their own, below their module. Raises UnknownModule.
    """
    manifest.module(path)
    lines = list(_module(manifest, _Fold([path]), 0))
    left = max((len(line.label) for line in lines if line.params or line.output), default=0)
    middle = max(len(line.params) for line in lines)
    rows = (f"{line.label:<{left}}  {line.params:<{middle}}  {line.output}".rstrip() for line in lines)
    return "\n".join(rows if path else [_title(manifest), "", *rows, *_notes(manifest)])


def draw_functions(manifest: Manifest, path: str) -> str:
    """A module's calls of functions, one a line in the order of its forward: name, arguments, result."""
    info = manifest.module(path)
    there = calls(info)
    width = max(map(len, there), default=0)
    where = path or manifest.model
    lines = [
        f"{where} ({info.cls}) calls",
        *(f"  {call:<{width}}  {_call(manifest, info, call)}" for call in there),
    ]
    return "\n".join(lines) if there else f"{where} ({info.cls}) calls no function that is a point"


def _call(manifest: Manifest, info: ModuleInfo, call: str) -> str:
    shown: list[str] = []
    inputs = info.points[f"{call}.inputs"]
    for part in inputs if isinstance(inputs, tuple) else ():
        if isinstance(part, tuple):
            shown += [_layout(item, manifest) or "-" for item in part]
        elif isinstance(part, dict):
            shown += [f"{name} {_layout(item, manifest)}" for name, item in part.items() if item is not None]
    return f"({', '.join(shown)}) -> {_layout(info.points[f'{call}.output'], manifest)}"


def _title(manifest: Manifest) -> str:
    facts = [manifest.dtype]
    if manifest.blocks:
        facts.append(f"{len(manifest.blocks)} blocks")
    if manifest.vocab is not None:
        facts.append(f"{manifest.vocab} tokens in the vocabulary")
    if manifest.positions is not None:
        facts.append(f"at most {manifest.positions} positions")
    return f"{manifest.model}: {', '.join(facts)}"


def _notes(manifest: Manifest) -> list[str]:
    notes = []
    if manifest.inputs:
        given = ", ".join(f"{name} {one}" for name, one in manifest.inputs.items())
        notes.append(f"Takes {'token ids, and ' if manifest.tokens else ''}{given}")
    if not manifest.attention and not manifest.modules[""].events:
        notes.append("Shapes and hook points are known once it has run")
    if manifest.attention not in ("interpose", ""):
        notes.append(f"The inside of attention has no points of its own: {manifest.attention}")
    if not manifest.row_independent:
        notes.append(f"Runs alone, never beside other jobs: {manifest.row_note}")
    return ["", *notes] if notes else []


def _module(manifest: Manifest, fold: _Fold, depth: int) -> Iterator[_Line]:
    path, indent = fold.paths[0], "  " * depth
    info = manifest.modules[path]
    between = " x " if len(fold.paths) > 1 else ": "
    name = fold.name if depth else path
    label = f"{indent}{name}{between}{info.cls}" if path else info.cls
    params = ", ".join(
        f"{name} {_tensor(param.shape, param.dtype, manifest)}" for name, param in info.params.items()
    )
    yield _Line(label, params, _result(manifest, info))
    for shape, names in _points(manifest, info).items():
        yield _Line(f"{indent}  . {', '.join(names)} {shape}")
    for child in _folded(manifest, path):
        yield from _module(manifest, child, depth + 1)


def _result(manifest: Manifest, info: ModuleInfo) -> str:
    if info.stands_for is not None:
        module, point = info.stands_for
        return f"stands for {point} of {module.rpartition('.')[2]}"
    calls = len(info.events.get("exit", ()))
    if not calls:
        if not manifest.modules[""].events:
            return ""  # nothing was ever run
        # Containers such as a ModuleList are never called either, which nobody needs to be told.
        return "" if manifest.children[info.path] else "(never called)"
    shown = _layout(info.points.get("output"), manifest, outermost=True)
    often = f" ({calls} calls)" if calls > 1 else ""
    return f"-> {shown}{often}" if shown or often else ""


def _points(manifest: Manifest, info: ModuleInfo) -> dict[str, list[str]]:
    """Shape -> named points of that shape."""
    found: dict[str, list[str]] = {}
    for name, layout in info.points.items():
        if name not in EVENT and call_of(name) is None:
            found.setdefault(_layout(layout, manifest), []).append(name)
    for name, named in manifest.named.get(info.path, {}).items():
        found.setdefault(_layout(leaf(manifest, named), manifest), []).append(name)
    return found


def _layout(layout: Layout, manifest: Manifest, outermost: bool = False) -> str:
    """A nest of shapes. What isn't a tensor is left out of a dict, and is "-" within a tuple."""
    if isinstance(layout, Leaf):
        return _tensor(layout.dims, layout.dtype, manifest)
    if isinstance(layout, tuple):
        parts = [_layout(item, manifest) for item in layout]
        return f"({', '.join(part or '-' for part in parts)})" if any(parts) else ""
    if isinstance(layout, dict):
        shown = {name: _layout(item, manifest) for name, item in layout.items()}
        text = ", ".join(f"{name} {part}" for name, part in shown.items() if part)
        return text if outermost or not text else f"{{{text}}}"
    return ""


def _tensor(dims: tuple[int | str, ...], dtype: str, manifest: Manifest) -> str:
    shape = f"[{', '.join(str(dim) for dim in dims)}]"
    return shape if dtype == manifest.dtype else f"{shape} {dtype}"


def _folded(manifest: Manifest, path: str) -> list[_Fold]:
    """A module's children, with runs of numbered ones that look the same taken together."""
    children = [f"{path}.{name}" if path else name for name in manifest.children[path]]
    folds = [_Fold([child]) for child in children[:1]]
    for before, child in pairwise(children):
        if _follows(before, child) and _alike(manifest, before, child):
            folds[-1].paths.append(child)
        else:
            folds.append(_Fold([child]))
    return folds


def _follows(before: str, after: str) -> bool:
    first, second = before.rpartition(".")[2], after.rpartition(".")[2]
    return first.isdecimal() and second.isdecimal() and int(second) == int(first) + 1


def _alike(manifest: Manifest, first: str, second: str) -> bool:
    """Whether two modules would be drawn the same but for their names."""
    one, other = manifest.modules[first], manifest.modules[second]
    ones, others = manifest.children[first], manifest.children[second]
    return (
        (one.cls, one.params, one.points) == (other.cls, other.params, other.points)
        and len(one.events.get("exit", ())) == len(other.events.get("exit", ()))
        and (one.stands_for is None) == (other.stands_for is None)
        and list(manifest.named.get(first, ())) == list(manifest.named.get(second, ()))
        and ones == others
        and all(_alike(manifest, f"{first}.{name}", f"{second}.{name}") for name in ones)
    )
