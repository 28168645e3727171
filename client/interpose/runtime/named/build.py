"""From a family's entry to the named points of one block, before anything is verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from ...graph.manifest import BATCH_SEQ, Leaf
from ...graph.model import Point
from ...graph.named import BLOCK, ROWS, Effect, Named, Step, View
from ...graph.values import DType, Ref
from .attending import attention
from .block import Block, Refused, contribution

ATTENTION = (
    *("attn_in", "q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "head_out"),
    *("attn_out_raw", "attn_out"),
)
MLP = ("mlp_in", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out_raw", "mlp_out")
ROUTING = ("router_logits", "expert_weights", "expert_ids")


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
        return contribution(block, _mlp(block, "mlp_out_raw"), family.mlp_post)
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


Maker: TypeAlias = Callable[[Block, str], Named]

_MAKERS: tuple[tuple[tuple[str, ...], Maker], ...] = (
    (("resid_pre", "resid_mid", "resid_post"), _residual),
    (ATTENTION, attention),
    (MLP, _mlp),
    (ROUTING, _routing),
)
