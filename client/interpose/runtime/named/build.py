"""From a family's entry to the named points of one block, before anything is verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...graph.manifest import BATCH_SEQ, Leaf, ModuleInfo, leaves
from ...graph.model import Key, Point
from ...graph.named import BLOCK, ROWS, Effect, Named, Step, View
from ...graph.values import DType, Ref
from .families import Family

ATTENTION = (
    *("attn_in", "q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "head_out"),
    *("attn_out_raw", "attn_out"),
)
MLP = ("mlp_in", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out_raw", "mlp_out")
ROUTING = ("router_logits", "expert_weights", "expert_ids")


class Refused(Exception):
    """Why a point can't be offered."""


@dataclass(frozen=True)
class Heads:
    """How many heads queries have, keys and values have, and how wide each is."""

    query: int
    key: int
    width: int


@dataclass
class Block:
    """One block while its points are found.

    Attributes:
        path: of the block.
        infos, modules: of the whole model.
        attention: what the manifest says of the inside of attention.
    """

    path: str
    family: Family
    config: Any
    infos: Mapping[str, ModuleInfo]
    modules: Mapping[str, nn.Module]
    attention: str
    named: dict[str, Named] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    # -- looking around ----------------------------------------------------------------------------------------

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if name else self.path

    def has(self, name: str) -> bool:
        return bool(name) and self.at(name) in self.infos

    def module(self, name: str) -> nn.Module:
        return self.modules[self.at(name)]

    def first(self, names: tuple[str, ...]) -> str:
        """The first of some modules that is here, or ""."""
        return next((name for name in names if self.has(name)), "")

    def info(self, name: str) -> ModuleInfo:
        if self.at(name) not in self.infos:
            raise Refused(f"its blocks have no module {name!r}")
        return self.infos[self.at(name)]

    def output(self, name: str) -> Point:
        """A module's output, of several the first."""
        info = self.info(name)
        layout = info.points.get("output")
        path: tuple[Key, ...] = (0,) if isinstance(layout, tuple) else ()
        return self._checked(Point(info.path, "output", path))

    def given(self, name: str) -> Point:
        """A module's first input."""
        info = self.info(name)
        inputs = info.points.get("inputs")
        if isinstance(inputs, tuple) and len(inputs) == 2:
            args, kwargs = inputs
            if isinstance(args, tuple) and args:
                return self._checked(Point(info.path, "inputs", (0, 0)))
            for key, layout in kwargs.items() if isinstance(kwargs, dict) else ():
                if leaves(layout):
                    return self._checked(Point(info.path, "inputs", (1, key)))
        raise Refused(f"{name or 'the block'} is given no tensor")

    def leaf(self, point: Point) -> Leaf:
        layout: Any = self.infos[point.module].points.get("inputs" if point.name == "stream" else point.name)
        for key in point.path:
            layout = layout[key]
        if not isinstance(layout, Leaf):
            raise Refused(f"{point} is no tensor")
        return layout

    def _checked(self, point: Point) -> Point:
        self.leaf(point)
        return point

    def tap(self) -> str | None:
        """The module within which attention is computed, if that can be looked into."""
        inside = (path for path in self.infos if path.startswith(self.path + "."))
        return next((path for path in inside if "pattern" in self.infos[path].points), None)

    @property
    def routed(self) -> bool:
        """Whether experts stand in place of this block's MLP."""
        return bool(self.first(self.family.router)) and not self.has(self.family.pre)

    @property
    def parallel(self) -> bool:
        return self.family.parallel(self.config)

    @property
    def heads(self) -> Heads:
        width = self.leaf(self.given(self.family.out)).dims[-1]
        query = figure(self.config, "num_attention_heads", "n_heads", "n_head")
        if query is None or not isinstance(width, int) or width % query:
            raise Refused("its heads can't be told from its config")
        key = figure(self.config, "num_key_value_heads", "num_kv_heads") or query
        if self.family.packing == "falcon":
            key = query if not (self.config.multi_query or self.config.new_decoder_architecture) else key
            key = 1 if self.config.multi_query and not self.config.new_decoder_architecture else key
        return Heads(query, key, width // query)


def figure(config: Any, *names: str) -> int | None:
    """The first of some whole numbers a config has."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def factor(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else 1.0


def build(block: Block) -> Block:
    """Fill in a block's points, and why it lacks the others."""
    for names, make in _MAKERS:
        for name in names:
            try:
                block.named[name] = flat(block, make(block, name))
            except Refused as error:
                block.refused[name] = str(error)
    block.named = {name: block.named[name] for name in BLOCK if name in block.named}
    return block


def flat(block: Block, named: Named) -> Named:
    """With rows and positions apart, where the model keeps them as one dimension."""

    def opened(point: Point, views: tuple[View, ...]) -> tuple[View, ...]:
        dims = block.leaf(point).dims
        return (("unflatten", 0, (ROWS, -1)), *views) if dims[:1] == (BATCH_SEQ,) else views

    effects = tuple(replace(effect, views=opened(effect.point, effect.views)) for effect in named.effects)
    steps = tuple(
        (*step[:4], opened(Point(step[1], step[2], step[3]), step[4])) if step[0] == "read" else step
        for step in named.steps
    )
    return replace(named, views=opened(named.point, named.views), effects=effects, steps=steps)


# -- the residual stream -----------------------------------------------------------------------------------------


def _residual(block: Block, name: str) -> Named:
    if name == "resid_pre":
        return Named(block.given(""))
    if name == "resid_post":
        return Named(block.output(""))
    if block.parallel:
        raise Refused(
            "attention and MLP read the same residual here and are added to it together: nothing lies between them"
        )
    if not block.family.mid:
        raise Refused(block.family.says.get("mlp", "its blocks have no middle"))
    if block.family.mid_as == "output":
        return Named(block.output(block.family.mid))
    given = block.given(block.family.mid)
    return Named(replace(given, name="stream") if block.family.mid_as == "stream" else given)


# -- attention ---------------------------------------------------------------------------------------------------


def _attention(block: Block, name: str) -> Named:
    family = block.family
    if not family.attn:
        raise Refused(family.says["attention"])
    if name == "attn_in":
        return Named(block.given(family.attn))
    if name == "attn_out_raw":
        inside = family.attn in family.adds or family.resid_norm[0]
        return Named(block.output(family.out if inside else family.attn))
    if name == "attn_out":
        return _contribution(block, _attention(block, "attn_out_raw"), family.attn_post)
    if name in ("q", "k", "v"):
        return _projected(block, "qkv".index(name))
    if name == "z":
        return Named(block.given(family.out), (_split(block.heads.query, block.heads.width),))
    if name == "head_out":
        return _by_head(block)
    path = block.tap()
    if path is None:
        raise Refused(f"the inside of attention has no points: {block.attention}")
    return Named(Point(path, name))


def _split(heads: int, width: int) -> View:
    return ("unflatten", 2, (heads, width))


def _projected(block: Block, which: int) -> Named:
    family, heads = block.family, block.heads
    if not family.qkv:
        name = (family.q, family.k, family.v)[which]
        count = heads.key if which else heads.query
        point = block.output(name)
        _expect(block, point, count * heads.width)
        return Named(point, (_split(count, heads.width),))
    point = block.output(family.qkv)
    if family.packing == "thirds":
        sizes = [heads.query * heads.width, heads.key * heads.width, heads.key * heads.width]
        _expect(block, point, sum(sizes))
        start = sum(sizes[:which])
        part: View = ("getitem", (..., slice(start, start + sizes[which])))
        return Named(point, (part, _split(heads.key if which else heads.query, heads.width)))
    if family.packing == "by head" or not (block.config.multi_query or block.config.new_decoder_architecture):
        _expect(block, point, 3 * heads.query * heads.width)
        opened: View = ("unflatten", 2, (heads.query, 3, heads.width))
        return Named(point, (opened, ("getitem", (..., which, slice(None)))))
    return _falcon(block, point, which)


def _falcon(block: Block, point: Point, which: int) -> Named:
    """Groups of query heads, each followed by its one key and one value head."""
    heads = block.heads
    group = heads.query // heads.key
    _expect(block, point, heads.key * (group + 2) * heads.width)
    opened: View = ("unflatten", 2, (heads.key, group + 2, heads.width))
    if which:
        return Named(point, (opened, ("getitem", (..., group + which - 1, slice(None)))))
    part: View = ("getitem", (..., slice(0, group), slice(None)))
    if heads.key == 1:
        return Named(point, (opened, part, ("getitem", (..., 0, slice(None), slice(None)))))
    # The heads of several groups are no view of the packed tensor: joined to read, split to write.
    read: Step = ("read", point.module, point.name, point.path, (opened, part))
    split: Step = ("unflatten", Ref(0), 2, (heads.key, group))
    return Named(point, (), (read, ("flatten", Ref(0), 2, 3)), (Effect(point, (opened, part), (split,)),))


def _expect(block: Block, point: Point, width: int) -> None:
    if block.leaf(point).dims[-1] != width:
        raise Refused(f"{point} is {block.leaf(point).dims[-1]} wide where its heads make {width}")


def _by_head(block: Block) -> Named:
    """Each head's part of the output projection: z times its slice of the weight."""
    out, heads = block.module(block.family.out), block.heads
    if not isinstance(out, (nn.Linear, Conv1D)) or not out.weight.is_floating_point():
        raise Refused("its output projection's weight isn't a plain matrix")
    z, raw = _attention(block, "z"), _attention(block, "attn_out_raw")
    columns = isinstance(out, nn.Linear)
    steps: tuple[Step, ...] = (
        _read(z.point, z.views),
        ("param", block.at(block.family.out), "weight"),
        ("unflatten", Ref(1), 1 if columns else 0, (heads.query, heads.width)),
        ("einsum", "bshd,ohd->bsho" if columns else "bshd,hdo->bsho", Ref(0), Ref(2)),
    )
    change: tuple[Step, ...] = (
        ("sub", Ref(0), Ref(1)),
        ("sum", Ref(2), (2,)),
        _read(raw.point, raw.views),
        ("add", Ref(4), Ref(3)),
    )
    return Named(raw.point, (), steps, (Effect(raw.point, raw.views, change),))


def _read(point: Point, views: tuple[View, ...] = ()) -> Step:
    return ("read", point.module, point.name, point.path, views)


def _contribution(block: Block, raw: Named, post: str) -> Named:
    """What is added to the residual: a sublayer's result after the norm or factor that follows it."""
    if post:
        return Named(block.output(post))
    scale = factor(block.config, block.family.multiplier)
    if scale == 1.0:
        return raw
    steps: tuple[Step, ...] = (_read(raw.point, raw.views), ("mul", Ref(0), scale))
    change: tuple[Step, ...] = (
        ("sub", Ref(0), Ref(1)),
        ("div", Ref(2), scale),
        _read(raw.point, raw.views),
        ("add", Ref(4), Ref(3)),
    )
    return Named(raw.point, (), steps, (Effect(raw.point, raw.views, change),))


# -- the MLP -----------------------------------------------------------------------------------------------------


def _mlp(block: Block, name: str) -> Named:
    family = block.family
    if "mlp" in family.says:
        raise Refused(family.says["mlp"])
    if name == "mlp_in":
        return Named(block.given(family.mlp or family.pre))
    if name == "mlp_out_raw":
        return Named(block.output(family.mlp if family.mlp and family.mlp not in family.adds else family.down))
    if name == "mlp_out":
        return _contribution(block, _mlp(block, "mlp_out_raw"), family.mlp_post)
    if block.routed:
        raise Refused(
            "this block is a mixture of experts: each token has several hidden layers, none of them the block's; "
            "see router_logits, expert_weights, expert_ids"
        )
    if name == "mlp_post":
        return Named(block.given(family.down))
    if name == "mlp_pre_linear" and not (family.linear or family.gate_up):
        raise Refused("its MLP has no gate: there is one projection up, mlp_pre")
    if not family.gate_up:
        return Named(block.output(family.pre if name == "mlp_pre" else family.linear))
    point = block.output(family.gate_up)
    width = block.leaf(point).dims[-1]
    if not isinstance(width, int):
        raise Refused(f"{point} has no fixed width")
    half = slice(0, width // 2) if name == "mlp_pre" else slice(width // 2, width)
    return Named(point, (("getitem", (..., half)),))


def _routing(block: Block, name: str) -> Named:
    family = block.family
    if "mlp" in family.says:
        raise Refused(family.says["mlp"])
    router = block.first(family.router)
    if not block.routed:
        raise Refused("this block has one MLP for every token, so nothing is routed")
    logits, weights, ids = _routes(block, router)
    if name != "router_logits":
        return Named(weights if name == "expert_weights" else ids)
    count = block.leaf(ids).dims[-1]
    chosen: tuple[Step, ...] = (
        ("softmax", Ref(0), -1, DType("float32")),
        ("topk", Ref(2), count),
        ("getitem", Ref(3), 1),
        ("getitem", Ref(3), 0),
    )
    if getattr(block.config, "norm_topk_prob", True):
        chosen += (("sum", Ref(5), (-1,), True), ("div", Ref(5), Ref(6)))
    last = Ref(len(chosen) + 1)
    kept = ("to", last, DType(block.leaf(weights).dtype))
    return Named(
        logits,
        (),
        (),
        (
            Effect(logits, (), (("to", Ref(0), DType(block.leaf(logits).dtype)),)),
            Effect(ids, (), chosen[:3]),
            Effect(weights, (), (*chosen, kept)),
        ),
    )


def _routes(block: Block, router: str) -> tuple[Point, Point, Point]:
    """Logits, weights and ids of a router's output, in whatever order it returns them."""
    info = block.info(router)
    layout = info.points.get("output")
    found = [
        (Point(info.path, "output", (index,)), item)
        for index, item in enumerate(layout if isinstance(layout, tuple) else ())
        if isinstance(item, Leaf)
    ]
    ids = [point for point, leaf in found if leaf.dtype.startswith("int")]
    chosen = block.leaf(ids[0]).dims[-1] if len(ids) == 1 else None
    narrow = [point for point, leaf in found if point not in ids and leaf.dims[-1] == chosen]
    wide = [point for point, leaf in found if point not in ids and leaf.dims[-1] != chosen]
    if len(narrow) != 1 or len(wide) != 1:
        raise Refused("its router's output can't be told apart into logits, weights and ids")
    return wide[0], narrow[0], ids[0]


Maker = Callable[[Block, str], Named]

_MAKERS: tuple[tuple[tuple[str, ...], Maker], ...] = (
    (("resid_pre", "resid_mid", "resid_post"), _residual),
    (ATTENTION, _attention),
    (MLP, _mlp),
    (ROUTING, _routing),
)


# -- the whole model ---------------------------------------------------------------------------------------------


def whole(
    model: nn.Module, family: Family, base: str, infos: Mapping[str, ModuleInfo]
) -> Iterator[tuple[str, Named | str]]:
    """The model's own points, or why there is none: (name, Named or reason).

    Args:
        base: path of the module that holds the list of blocks.
    """
    names = {module: path for path, module in model.named_modules()}

    def found(module: Any) -> str | None:
        return names.get(module) if isinstance(module, nn.Module) else None

    def of(path: str | None, reason: str) -> Named | str:
        fits = path is not None and path in infos and isinstance(infos[path].points.get("output"), Leaf)
        return Named(Point(str(path), "output")) if fits else reason

    def below(name: str) -> str | None:
        return (f"{base}.{name}" if base else name) if name else None

    yield "embed", of(embedding(model, found), "its embedding makes no single tensor")
    positions = "it has no table of positions: they come in by rotation or slopes inside attention"
    yield "pos_embed", of(_position(family, base), positions if not family.pos_embed else "its table isn't called")
    yield (
        "final_norm",
        of(below(family.final_norm), family.says.get("final_norm", "it has no norm after its last block")),
    )
    layout = infos[""].points.get("output")
    if isinstance(layout, dict) and isinstance(layout.get("logits"), Leaf):
        yield "logits", Named(Point("", "output", ("logits",)))
    else:
        yield "logits", "this model has no head that makes logits"


def embedding(model: nn.Module, found: Callable[[Any], str | None]) -> str | None:
    try:
        return found(model.get_input_embeddings())  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _position(family: Family, base: str) -> str | None:
    if not family.pos_embed:
        return None
    # An encoder keeps its embeddings beside the module that holds its blocks.
    root = base.rpartition(".")[0] if family.pos_embed.startswith("embeddings.") else base
    return f"{root}.{family.pos_embed}" if root else family.pos_embed
