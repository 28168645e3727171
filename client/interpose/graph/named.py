"""Standard names of hook points, as data: where a family keeps a value, and what else goes by that name.

A named point is a view of a physical point, or, where the model never makes the tensor itself, a few operations on
values it does make. Either way a client reads and writes it with ordinary nodes, so a server needs to know nothing
of names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import InvalidGraph, UnknownPoint
from .model import Key, Point
from .values import Arg, decode, encode, substitute

View: TypeAlias = tuple[Any, ...]
"""A view op and its further arguments: ("getitem", 0)."""

Step: TypeAlias = tuple[Any, ...]
"""An op of the table with its arguments; a Ref is the number of an earlier step. Beside the table's there are
("read", module, point name, path, views) and ("param", module, name)."""

ROWS = "batch"
"""In a view's sizes: the number of rows at hand."""

BLOCK = (
    *("resid_pre", "attn_in", "q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "head_out"),
    *("attn_out_raw", "attn_out", "resid_mid", "mlp_in", "mlp_pre", "mlp_pre_linear", "mlp_post"),
    *("router_logits", "expert_weights", "expert_ids", "mlp_out_raw", "mlp_out", "resid_post"),
)
"""Names a block may have, in the order of its forward."""

MODEL = ("embed", "pos_embed", "final_norm", "logits")
"""Names the whole model may have."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a write of a named point does at one physical place.

    Attributes:
        point, views: the place.
        steps: what is put there. Ref(0) is the new value of the named point, Ref(1) the one before, Ref(2) the
            first step; the last step's value is put.
    """

    point: Point
    views: tuple[View, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Named:
    """One named point of one owner.

    Attributes:
        point, views: where it lies; of a computed one, the place nearest to it.
        steps: how it is computed, empty for a plain view. Ref(0) is the first step.
        effects: how it is written, empty if a write at its place is all.
    """

    point: Point
    views: tuple[View, ...] = ()
    steps: tuple[Step, ...] = ()
    effects: tuple[Effect, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is a view of its point, read and written there."""
        return not self.steps and not self.effects


Offers: TypeAlias = Mapping[str, Mapping[str, Named]]
"""Owner (a block's path, "" for the model) -> name -> point."""

Refusals: TypeAlias = Mapping[str, Mapping[str, str]]
"""Owner -> name -> why there is no such point. What holds for every block stands under ""."""


def refusal(refused: Refusals, owner: str, name: str) -> str | None:
    """Why an owner has no point of a standard name, None if nothing is known."""
    return refused.get(owner, {}).get(name) or refused.get("", {}).get(name)


def sized(views: Sequence[View], rows: int) -> tuple[View, ...]:
    """The views for a known number of rows."""
    return tuple(_sized(view, rows) for view in views)


def _sized(value: Any, rows: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_sized(item, rows) for item in value)
    return rows if isinstance(value, str) and value == ROWS else value


def perform(
    steps: Sequence[Step],
    given: Sequence[Any],
    read: Callable[[Point, tuple[View, ...]], Any],
    op: Callable[[str, tuple[Any, ...]], Any],
) -> Any:
    """The last step's value.

    Args:
        given: what the first Refs stand for.
        read: the value at a point, seen through views.
        op: the value of an op; "param" too.
    """
    values = list(given)
    for name, *args in steps:
        if name == "read":
            module, point, path, views = args
            values.append(read(Point(module, point, tuple(path)), tuple(views)))
        else:
            values.append(op(name, tuple(substitute(arg, values.__getitem__) for arg in args)))
    return values[-1]


# -- the plain form ----------------------------------------------------------------------------------------------


def encode_named(named: Offers) -> dict[str, Any]:
    """The plain form. Paths are told relative to the owner, so that blocks which are alike share one entry."""
    table: dict[str, int] = {}
    owners = {}
    for owner, points in named.items():
        plain = json.dumps({name: _encode(point, owner) for name, point in points.items()})
        owners[owner] = table.setdefault(plain, len(table))
    return {"kinds": [json.loads(entry) for entry in table], "owners": owners}


def decode_named(plain: Any) -> dict[str, dict[str, Named]]:
    """Raises InvalidGraph, KeyError, TypeError or ValueError if malformed."""
    kinds = plain["kinds"]
    return {
        str(owner): {str(name): _decode(point, str(owner)) for name, point in kinds[index].items()}
        for owner, index in plain["owners"].items()
    }


def _encode(named: Named, owner: str) -> list[Any]:
    effects = [
        [_encode_point(effect.point, owner), encode(effect.views), _encode_steps(effect.steps, owner)]
        for effect in named.effects
    ]
    return [_encode_point(named.point, owner), encode(named.views), _encode_steps(named.steps, owner), effects]


def _decode(plain: Any, owner: str) -> Named:
    point, views, steps, effects = plain
    made = tuple(
        Effect(_decode_point(at, owner), _views(through), _decode_steps(inner, owner))
        for at, through, inner in effects
    )
    return Named(_decode_point(point, owner), _views(views), _decode_steps(steps, owner), made)


def _encode_point(point: Point, owner: str) -> list[Any]:
    return [_relative(point.module, owner), point.name, list(point.path)]


def _decode_point(plain: Any, owner: str) -> Point:
    module, name, path = plain
    return Point(_absolute(str(module), owner), str(name), tuple(map(_key, path)))


def _encode_steps(steps: Sequence[Step], owner: str) -> list[Any]:
    return [encode(_moved(step, lambda path: _relative(path, owner))) for step in steps]


def _decode_steps(plain: Any, owner: str) -> tuple[Step, ...]:
    return tuple(_moved(_view(step), lambda path: _absolute(path, owner)) for step in plain)


def _moved(step: Step, move: Callable[[str], str]) -> Step:
    return (step[0], move(step[1]), *step[2:]) if step[0] in ("read", "param") else step


def _views(plain: Any) -> tuple[View, ...]:
    found = decode(plain)
    if not isinstance(found, tuple):
        raise InvalidGraph("a named point's views are no tuple")
    return tuple(map(_checked, found))


def _view(plain: Any) -> View:
    return _checked(decode(plain))


def _checked(found: Arg) -> View:
    if not isinstance(found, tuple) or not found or not isinstance(found[0], str):
        raise InvalidGraph("a step of a named point is an op and its arguments")
    return found


def _key(key: Any) -> Key:
    if type(key) is not int and not isinstance(key, str):
        raise InvalidGraph("a path's keys are whole numbers and names")
    return key


def _relative(path: str, owner: str) -> str:
    """ "." for the owner itself, ".attn" below it; other paths as they are."""
    if not owner:
        return path
    return path[len(owner) :] or "." if f"{path}.".startswith(f"{owner}.") else path


def _absolute(path: str, owner: str) -> str:
    if not owner or not path.startswith("."):
        return path
    return owner if path == "." else owner + path


# -- other spellings ---------------------------------------------------------------------------------------------

_HEADS_SECOND = (("transpose", 1, 2),)

LENS: Mapping[str, tuple[str, tuple[View, ...]]] = {
    "hook_resid_pre": ("resid_pre", ()),
    "attn.hook_q": ("q", ()),
    "attn.hook_k": ("k", ()),
    "attn.hook_v": ("v", ()),
    "attn.hook_rot_q": ("q_rot", _HEADS_SECOND),
    "attn.hook_rot_k": ("k_rot", _HEADS_SECOND),
    "attn.hook_attn_scores": ("scores", ()),
    "attn.hook_pattern": ("pattern", ()),
    "attn.hook_z": ("z", ()),
    "attn.hook_result": ("head_out", ()),
    "hook_attn_out": ("attn_out", ()),
    "hook_resid_mid": ("resid_mid", ()),
    "mlp.hook_pre": ("mlp_pre", ()),
    "mlp.hook_pre_linear": ("mlp_pre_linear", ()),
    "mlp.hook_post": ("mlp_post", ()),
    "mlp.hook_expert_weights": ("expert_weights", ()),
    "mlp.hook_expert_indices": ("expert_ids", ()),
    "hook_mlp_out": ("mlp_out", ()),
    "hook_resid_post": ("resid_post", ()),
}
"""TransformerLens's name within a block -> ours, and the views to its order of dimensions; as a forward goes."""

_LENS_MODEL = {"hook_embed": "embed", "hook_pos_embed": "pos_embed", "unembed": "logits"}

_LENS_REFUSED = {
    "hook_normalized": "it is the value before the norm's gain, which is no point of the block; a norm's output is "
    "after it: read the norm module's output, or where its forward is written out, functions.mul[0].output",
    "hook_scale": "the model never makes a norm's scale; compute it from the norm module's input",
    "hook_attn_in": "it is a copy of the residual for each head, which only TransformerLens makes; see resid_pre",
    "hook_q_input": "it is a copy of the residual for each head, which only TransformerLens makes; see resid_pre",
    "hook_k_input": "it is a copy of the residual for each head, which only TransformerLens makes; see resid_pre",
    "hook_v_input": "it is a copy of the residual for each head, which only TransformerLens makes; see resid_pre",
    "hook_mlp_in": "it is a copy of the residual before the norm; see resid_mid, and mlp_in after the norm",
}

SERIES: Mapping[str, str] = {
    "layers_input": "resid_pre",
    "layers_output": "resid_post",
    "attentions_input": "attn_in",
    "attentions_output": "attn_out_raw",
    "attention_probabilities": "pattern",
    "mlps_input": "mlp_in",
    "mlps_output": "mlp_out_raw",
    "routers_output": "router_logits",
}
"""nnterp's names of a value in every block, `model.layers_output[i]` -> ours."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """What a TransformerLens string stands for: the block's index (None: the model), our name, further views."""

    block: int | None
    name: str
    views: tuple[View, ...] = ()


def spelled(text: str) -> Spelled | None:
    """The named point a TransformerLens string means, None if it isn't one.

    Raises UnknownPoint for strings that name values no model here makes.
    """
    if text in _LENS_MODEL:
        return Spelled(None, _LENS_MODEL[text])
    reason = _LENS_REFUSED.get(text.rpartition(".")[2])
    parts = text.split(".", 2)
    if reason is not None and (parts[0] == "blocks" or parts[0] == "ln_final"):
        raise UnknownPoint(f"{text}: {reason}")
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdecimal():
        return None
    if parts[2] in BLOCK:
        return Spelled(int(parts[1]), parts[2])
    if parts[2] not in LENS:
        raise UnknownPoint(f"{text} is no point of TransformerLens known here; there are {', '.join(LENS)}")
    name, views = LENS[parts[2]]
    return Spelled(int(parts[1]), name, views)
