"""The named points of a block's attention: what goes in, queries, keys, values, heads, what comes out."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...graph.functions import call_of
from ...graph.model import Point
from ...graph.named import Effect, Named, Step, View
from ...graph.values import Ref
from .block import Block, Refused, contribution, reading


def attention(block: Block, name: str) -> Named:
    """One named point of a block's attention. Raises Refused."""
    family = block.family
    if not family.attn:
        raise Refused(family.says["attention"])
    if name == "attn_in":
        return Named(block.given(family.attn))
    if name == "attn_out_raw":
        inside = family.attn in family.adds or family.resid_norm[0]
        return Named(block.output(family.out if inside else family.attn))
    if name == "attn_out":
        return contribution(block, attention(block, "attn_out_raw"), family.attn_post)
    if name in ("q", "k", "v"):
        return _projected(block, "qkv".index(name))
    if name == "z":
        return Named(block.given(family.out), (_split(block.heads.query, block.heads.width),))
    if name == "head_out":
        return _by_head(block)
    path = block.tap()
    if path is not None:
        return Named(Point(path, name))
    if name in ("scores", "pattern"):
        return _called(block, family.scores if name == "scores" else family.pattern, name)
    if family.alibi and family.scores:
        raise Refused(f"nothing is rotated: positions come in as slopes on the scores; see {name[0]}")
    raise Refused(f"the inside of attention has no points: {block.attention}")


def _called(block: Block, at: str, name: str) -> Named:
    """A value at a function's call within the attention module, or at a module within it."""
    family = block.family
    if not at:
        raise Refused(f"the inside of attention has no points: {block.attention}")
    if at.endswith(".inputs"):
        return Named(block.checked(Point(block.at(family.attn), at, (0, 0))))
    if call_of(at) is not None:
        return Named(block.checked(Point(block.at(family.attn), at)))
    return Named(block.output(f"{family.attn}.{at}"))


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
    z, raw = attention(block, "z"), attention(block, "attn_out_raw")
    columns = isinstance(out, nn.Linear)
    steps: tuple[Step, ...] = (
        reading(z.point, z.views),
        ("param", block.at(block.family.out), "weight"),
        ("unflatten", Ref(1), 1 if columns else 0, (heads.query, heads.width)),
        ("einsum", "bshd,ohd->bsho" if columns else "bshd,hdo->bsho", Ref(0), Ref(2)),
    )
    change: tuple[Step, ...] = (
        ("sub", Ref(0), Ref(1)),
        ("sum", Ref(2), (2,)),
        reading(raw.point, raw.views),
        ("add", Ref(4), Ref(3)),
    )
    return Named(raw.point, (), steps, (Effect(raw.point, raw.views, change),))
