"""Names of modules and their hook points, as the user writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ..errors import BadArgument, UnknownModule, UnknownPoint
from ..graph.functions import call_of, no_such_point, own
from ..graph.manifest import Leaf, Manifest, ModuleInfo, first_input, walk
from ..graph.model import Key, Point
from ..graph.values import Ref
from . import standard
from .functions import Functions
from .recorder import Recorder

if TYPE_CHECKING:
    from .tracer import Model

COMMON = ("output", "input", "inputs")


class Module:
    """A module of the model: `model.transformer.h[5].attn`.

    `output`, `input` (the first argument) and `inputs` (all of them) are its hook points, beside those the model
    family names (a block's `resid_pre`, `q`, `pattern`, ...; see `graph.named`), and those at the functions its own
    forward calls: `functions.softmax[0].output`; `source.softmax_0` is the same. A child of one of these names
    comes first; the point stays reachable as `points["output"]`.
    """

    _owner: Model
    _path: str
    _call: int | None
    _aliases: Mapping[str, Sequence[str]] = {}

    def __init__(self, model: Model, path: str, call: int | None = None) -> None:
        self.__dict__.update(_owner=model, _path=path, _call=call)

    @property
    def _manifest(self) -> Manifest:
        return self._owner._tree()

    @property
    def _info(self) -> ModuleInfo:
        return self._manifest.module(self._path)

    @property
    def points(self) -> Points:
        """The module's hook points by name, also those a child's name shadows."""
        return Points(self)

    @property
    def calls(self) -> Calls:
        """The module's calls within one forward, for one that is called several times: `calls[1].output`."""
        return Calls(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # What these raised themselves, Python took for a missing attribute.
        if name == "_info":
            return self._manifest.module(self._path)
        if name == "_manifest":
            return self._owner._tree()
        manifest = self._owner._tree()
        info = manifest.module(self._path)
        if name in manifest.children[self._path]:
            return self._child(name)
        for target in self._owner._aliases.get(name, ()):
            if target in manifest.children[self._path]:
                return self._child(target)
            if not self._path and target.startswith(".") and target[1:] in manifest.modules:
                return Module(self._owner, target[1:])
        if name in COMMON or name in info.points:
            return self.points[name]
        if standard.find(manifest, self._path, name) is not None:
            return self.points[name]
        if not self._path and (found := standard.attribute(self, name)) is not None:
            return found
        if name in ("functions", "source"):
            return Functions(self)
        if name in info.params:
            recorder = self._owner._recording()
            return recorder.value(recorder.node("param", (self._path, name)))
        where = f"{self._path} ({info.cls})" if self._path else f"{manifest.model} ({info.cls})"
        also = [*COMMON, *standard.names(manifest, self._path)]
        raise UnknownModule(f"{where} has no {name!r}{manifest.nearest(self._child_path(name), also)}")

    def __setattr__(self, name: str, value: Any) -> None:
        named = name in COMMON or name in self._info.points
        if named or standard.find(self._manifest, self._path, name) is not None:
            self.points[name] = value
        else:
            raise UnknownPoint(f"only hook points can be assigned: output, input, inputs; {name!r} is none")

    def __getitem__(self, index: int | slice) -> Any:
        children = self._numbered()
        try:
            names = children[index]
        except IndexError:
            raise UnknownModule(f"{self._path} has {len(children)} modules; there is no [{index}]") from None
        return [self._child(name) for name in names] if isinstance(names, list) else self._child(names)

    def __len__(self) -> int:
        return len(self._numbered())

    def __iter__(self) -> Iterator[Any]:
        return iter([self._child(name) for name in self._numbered()])

    def __call__(self, value: Any) -> Any:
        """The module's output for another value than the model's: `model.lm_head(h)`. Fires no hooks."""
        recorder = self._owner._recording()
        given = recorder.arg(value)
        if not isinstance(given, Ref):
            raise BadArgument(f"{self._path} is called on a tensor")
        return recorder.value(recorder.node("call", (self._path, given)))

    def skip(self, value: Any) -> None:
        """Put `value` in place of the module's output, as if the module hadn't been run.

        Raises WrongOrder if the value comes only after the module has begun.
        """
        recorder = self._owner._recording()
        recorder.points.skip(self._path, self._call or 0, value)
        self.points["output"] = value

    def next(self, count: int = 1) -> Module:
        """The module at the next step of a generation, here and in the lines that follow."""
        recorder, tracer = self._owner._recording(), _open()
        step = recorder.step + recorder.ahead[recorder.invoke, self._path]
        tracer.iter.later(step, count)
        recorder.ahead[recorder.invoke, self._path] += count
        return self

    def all(self) -> Any:
        """Every step of a generation, as `t.all()`: `with model.lm_head.all():`."""
        self._owner._recording()
        return _open().all()

    def _own_step(self, recorder: Recorder) -> AbstractContextManager[None]:
        """Where `next` has brought it."""
        if not recorder.ahead or recorder.in_steps():
            return nullcontext()
        return _further(recorder, recorder.ahead[recorder.invoke, self._path])

    def __repr__(self) -> str:
        from ..draw import draw

        return draw(self._manifest, self._path)

    def _numbered(self) -> list[str]:
        names = list(self._manifest.children[self._path])
        if not all(name.isdigit() for name in names):
            raise TypeError(
                f"{self._path or 'the model'} is no list of modules; its children are {', '.join(names)}"
            )
        return names

    def _child(self, name: str) -> Module:
        return Module(self._owner, self._child_path(name))

    def _child_path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name


class Calls:
    """A module's calls within one forward, by number."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def __getitem__(self, index: int) -> Module:
        return Module(self._module._owner, self._module._path, index)


class Points:
    """Hook points of one module by name. Reading one in a block gives a deferred value; assigning replaces it."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def __getitem__(self, name: str) -> Any:
        recorder = self._module._owner._recording()
        with self._module._own_step(recorder):
            return self._read(recorder, name)

    def _read(self, recorder: Recorder, name: str) -> Any:
        place = self._standard(name)
        if place is not None:
            return standard.read(recorder, place)
        point, role = self._find(name)
        value = recorder.points.at(point)
        if role:
            value._role = role
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        recorder = self._module._owner._recording()
        with self._module._own_step(recorder):
            self._write(recorder, name, value)

    def _write(self, recorder: Recorder, name: str, value: Any) -> None:
        place = self._standard(name)
        if place is not None:
            standard.replace(recorder, place, value)
            return
        point, role = self._find(name)
        if (
            role == "block"
            and isinstance(value, tuple)
            and value
            and not any(part is not None for part in value[1:])
        ):
            value = value[0]
        layout = walk(recorder.manifest.module(point.module).points[point.name], point.path)
        if isinstance(layout, Leaf):
            recorder.points.replace(point, value)
        else:
            _replace_parts(recorder, point, layout, value)

    def __iter__(self) -> Iterator[str]:
        return iter([*own(self._module._info), *standard.names(self._module._manifest, self._module._path)])

    def __repr__(self) -> str:
        return f"<points of {self._module._path or 'the model'}: {', '.join(self)}>"

    def _standard(self, name: str) -> standard.Place | None:
        """The named point of that name, unless the module has a point of its own under it."""
        if name in COMMON or name in self._module._info.points:
            return None
        return standard.find(self._module._manifest, self._module._path, name)

    def _find(self, name: str) -> tuple[Point, str]:
        """The point a name stands for here, and the role of what is read there."""
        module, known = self._module, self._module._manifest.found
        about = module._path, name, module._call, module._owner._output_is_logits
        if about not in known:
            known[about] = self._found(name)
        found: tuple[Point, str] = known[about]
        return found

    def _found(self, name: str) -> tuple[Point, str]:
        module = self._module
        info, call = module._info, module._call or 0
        times = len(info.events.get("enter", ()))
        if times > 1 and module._call is None:
            raise UnknownPoint(f"{module._path} is called {times} times in a forward; say which: .calls[0].{name}")
        if info.stands_for is not None and name in COMMON:
            path, other = info.stands_for
            return Point(path, other, call=call), ""
        if name == "input" or name.endswith(".input"):
            return Point(module._path, f"{name}s", self._first(info, f"{name}s"), call), ""
        if name not in info.points:
            raise UnknownPoint(no_such_point(info, name, module._path or "the model"))
        point = Point(module._path, name, call=call)
        if name != "output":
            return point, ""
        return self._output(point, info)

    def _output(self, point: Point, info: ModuleInfo) -> tuple[Point, str]:
        layout = info.points["output"]
        if point.module in self._module._manifest.stream:
            path: tuple[Key, ...] = (0,) if isinstance(layout, tuple) else ()
            return point.inner(*path), "block"
        logits = self._module._owner._output_is_logits and isinstance(layout, dict) and layout.get("logits")
        if not point.module and logits:
            return point.inner("logits"), "model"
        return point, ""

    def _first(self, info: ModuleInfo, name: str) -> tuple[Key, ...]:
        """Where the first argument of a module or a function is, given by position or by name."""
        if call_of(name) is not None and name not in info.points:
            raise UnknownPoint(no_such_point(info, name, info.path or "the model"))
        found = first_input(info.points.get(name))
        if found is None:
            raise UnknownPoint(f"{info.path or 'the model'} was given no tensor; there is no input to read")
        return found


def aliases(rename: Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """New name -> what it stands for: a child's name wherever there is such a child, or "." and a path.

    Raises BadArgument for a new name that is none, such as a path.
    """
    found: dict[str, tuple[str, ...]] = {}
    for target, names in rename.items():
        for name in [names] if isinstance(names, str) else names:
            if not name.isidentifier():
                raise BadArgument(f"rename gives {target!r} a new name, not a path like {name!r}")
            path = "." + target.strip(".") if "." in target else target
            found[name] = (*found.get(name, ()), path)
    return found


def _open() -> Any:
    """The open block."""
    from .tracer import ACTIVE

    return ACTIVE.get()


@contextmanager
def _further(recorder: Recorder, steps: int) -> Iterator[None]:
    before = recorder.step
    recorder.step += steps
    try:
        yield
    finally:
        recorder.step = before


def _replace_parts(recorder: Recorder, point: Point, layout: Any, value: Any) -> None:
    """Replace every tensor of a nest by the one at the same place of `value`."""
    keys = list(layout) if isinstance(layout, dict) else list(range(len(layout or ())))
    try:
        parts = {key: value[key] for key in keys}
    except (LookupError, TypeError):
        raise BadArgument(f"{point} is a nest of {keys}; give one value for each") from None
    for key, part in parts.items():
        inner, at = layout[key], point.inner(key)
        if isinstance(inner, Leaf):
            recorder.points.replace(at, part)
        elif inner is not None:
            _replace_parts(recorder, at, inner, part)
