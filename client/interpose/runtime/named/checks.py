"""What must hold between named points, as numbers: each identity says how one value follows from others.

An identity that holds on an untouched run shows that its values are what their names say; that it still holds when
one of the values it starts from was written shows that the write reached the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...graph.model import Point
from ...graph.named import View, perform, sized
from .. import kernels
from ..hooks import no_hooks
from ..offloaded import brought
from .block import Block, Heads, factor
from .sheet import Name

Values: TypeAlias = Mapping[str, Tensor]
"""Values of one block, or of the whole model, by name."""

Row: TypeAlias = tuple[str, str, tuple[str, ...], Callable[[Values], Sequence[Tensor]]]
"""What is said, of which output, from which inputs, and the arithmetic."""

_MASKED = -1e4
"""Scores below this are masked."""


@dataclass(frozen=True)
class Identity:
    """`output` is one of what `expected` makes of `inputs`: conventions differ where no config tells which."""

    says: str
    output: Name
    inputs: tuple[Name, ...]
    expected: Callable[[Values], Sequence[Tensor]]
    compared: Callable[[Tensor], Tensor] = field(default=lambda value: value)


@dataclass
class Bench:
    """The arithmetic of one block, done by hand.

    Attributes:
        rotation: the cosines and sines its attention is given, None if it is given none.
    """

    block: Block
    rotation: tuple[Tensor, Tensor] | None

    def identities(self) -> Iterator[Identity]:
        """All identities between points this block has."""
        for says, output, inputs, expected in self._all():
            names = tuple((self.block.path, name) for name in inputs)
            if output in self.block.named and all(name in self.block.named for name in inputs):
                compared = unmasked if output == "scores" else _itself
                yield Identity(says, (self.block.path, output), names, expected, compared)

    def _all(self) -> Iterator[Row]:
        yield "attn_in is the normalised resid_pre", "attn_in", ("resid_pre",), self.attn_in
        for name in ("q", "k", "v"):
            yield f"{name} is its projection of attn_in", name, ("attn_in",), partial(self.projected, name)
        for name in ("q", "k"):
            says = f"{name}_rot is {name} after norm and rotation"
            yield says, f"{name}_rot", (name,), partial(self.turned, name)
        yield "scores are the scaled products of q_rot and k_rot", "scores", ("q_rot", "k_rot"), self.scores
        if "q_rot" not in self.block.named:
            yield "scores are the scaled products of q and k, and slopes", "scores", ("q", "k"), self.sloped_scores
        yield "pattern is the softmax of scores", "pattern", ("scores",), self.pattern
        if "pattern" in self.block.named:
            yield "z is pattern times v", "z", ("pattern", "v"), self.z
        else:
            yield "z is what attention makes of q, k and v", "z", ("q", "k", "v"), self.attended
        yield "attn_out_raw is the output projection of z", "attn_out_raw", ("z",), self.attn_out_raw
        yield "attn_out_raw is the sum of head_out, and the bias", "attn_out_raw", ("head_out",), self.summed
        yield "attn_out is attn_out_raw as it is added", "attn_out", ("attn_out_raw",), self.attn_out
        yield "resid_mid is resid_pre + attn_out", "resid_mid", ("resid_pre", "attn_out"), self.resid_mid
        yield from self._later()

    def _later(self) -> Iterator[Row]:
        """From attention on."""
        parallel = self.block.parallel
        before = "resid_pre" if parallel else "resid_mid"
        yield f"mlp_in is the normalised {before}", "mlp_in", (before,), partial(self.mlp_in, before)
        for name in ("mlp_pre", "mlp_pre_linear"):
            yield f"{name} is its projection of mlp_in", name, ("mlp_in",), partial(self.up, name)
        gated = "mlp_pre_linear" in self.block.named
        hidden = ("mlp_pre", "mlp_pre_linear") if gated else ("mlp_pre",)
        yield "mlp_post is the activation of mlp_pre", "mlp_post", hidden, self.mlp_post
        yield "mlp_out_raw is the down projection of mlp_post", "mlp_out_raw", ("mlp_post",), self.down
        yield "router_logits are the router's products with mlp_in", "router_logits", ("mlp_in",), self.router
        yield "expert_ids are those of the largest router_logits", "expert_ids", ("router_logits",), self.chosen
        yield "expert_weights follow from router_logits", "expert_weights", ("router_logits",), self.weights
        mixed = ("mlp_in", "expert_weights", "expert_ids")
        yield "mlp_out_raw is the experts' weighted sum", "mlp_out_raw", mixed, self.experts
        yield "mlp_out is mlp_out_raw as it is added", "mlp_out", ("mlp_out_raw",), self.mlp_out
        summed = ("resid_pre", "attn_out", "mlp_out") if parallel else ("resid_mid", "mlp_out")
        yield f"resid_post is {' + '.join(summed)}", "resid_post", summed, partial(self.resid_post, summed)
        if self.block.has("mixer"):
            yield "resid_post is resid_pre + its mixer's output", "resid_post", ("resid_pre",), self.mixed

    # -- parts -------------------------------------------------------------------------------------------------

    def call(self, name: str, value: Tensor, *more: Any) -> Tensor:
        with no_hooks():
            found = self.block.module(name)(value, *more)
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    @property
    def heads(self) -> Heads:
        return self.block.heads

    def attn_in(self, v: Values) -> Sequence[Tensor]:
        norm = self.block.first(self.block.family.attn_norm)
        return [self.call(norm, v["resid_pre"]) if norm else v["resid_pre"]]

    def projected(self, name: str, v: Values) -> Sequence[Tensor]:
        named = self.block.named[name]

        def read(point: Point, views: tuple[View, ...]) -> Tensor:
            with no_hooks():
                found: Tensor = seen(self.block.modules[point.module](v["attn_in"]), views)
            return found

        if named.steps:
            return [perform(named.steps, (), read, _computed)]
        return [read(named.point, named.views)]

    def turned(self, which: str, v: Values) -> Sequence[Tensor]:
        """[batch, seq, heads, width] after the norm of queries or keys, if there is one, and the rotation."""
        value = v[which]
        for suffix in ("_norm", "_layernorm"):
            norm = f"{self.block.family.attn}.{which}{suffix}"
            if self.block.has(norm) and isinstance(self.block.module(norm), nn.Module):
                weight = getattr(self.block.module(norm), "weight", None)
                wide = isinstance(weight, Tensor) and weight.shape[0] != value.shape[-1]
                value = self.call(norm, value.flatten(2)).view_as(value) if wide else self.call(norm, value)
        value = value.transpose(1, 2)
        if self.rotation is None or self.sloped:
            return [value, value * self.scale]
        cos, sin = self.rotation
        halves = (half[..., : half.shape[-1] // 2].repeat_interleave(2, -1) for half in (cos, sin))
        return [rotate(value, cos, sin), rotate_pairs(value, *halves), rotate_pairs(value, cos, sin)]

    @property
    def sloped(self) -> bool:
        """Whether positions come in by ALiBi's slopes."""
        return self.block.family.alibi or bool(getattr(self.block.config, "alibi", False))

    @property
    def scale(self) -> float:
        attn = self.block.module(self.block.family.attn)
        found = getattr(attn, "scaling", getattr(attn, "softmax_scale", None))
        return float(found) if isinstance(found, (int, float)) else self.heads.width**-0.5

    def scores(self, v: Values) -> Sequence[Tensor]:
        q, k = v["q_rot"].float(), spread(v["k_rot"], v["q_rot"].shape[1]).float()
        made = []
        for scale in dict.fromkeys((self.scale, self.heads.width**-0.5, 1.0)):
            products = q @ k.transpose(-1, -2) * scale
            cap = getattr(self.block.config, "attn_logit_softcapping", None)
            products = torch.tanh(products / cap) * cap if isinstance(cap, (int, float)) else products
            made.append(products.masked_fill(v["scores"] <= _MASKED, _MASKED) if "scores" in v else products)
        return made

    def pattern(self, v: Values) -> Sequence[Tensor]:
        return [v["scores"].float().softmax(-1)]

    def z(self, v: Values) -> Sequence[Tensor]:
        return [(v["pattern"] @ spread(v["v"].transpose(1, 2), v["pattern"].shape[1])).transpose(1, 2)]

    def attended(self, v: Values) -> Sequence[Tensor]:
        """Attention by hand, causal, for models whose own can't be looked into."""
        value = spread(v["v"].transpose(1, 2), v["q"].shape[2]).float()
        return [(scores.softmax(-1) @ value).transpose(1, 2) for scores in self.sloped_scores(v)]

    def sloped_scores(self, v: Values) -> Sequence[Tensor]:
        q = self.turned("q", v)[0].float()
        k = spread(self.turned("k", v)[0], q.shape[1]).float()
        products = q @ k.transpose(-1, -2) * self.scale
        length = products.shape[-1]
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        biases = [torch.zeros(1, device=q.device)]
        if self.sloped:
            each, places = slopes(q.shape[1]).to(q.device)[:, None, None], torch.arange(length, device=q.device)
            # Falcon makes its slopes in bfloat16, whatever the weights are, and scales them with the products.
            rough = (each.bfloat16() * places).float()
            # MPT counts them back from the last position.
            biases = [each * places, each * (places - length + 1)]
            biases += [each * places * self.scale, rough, rough * self.scale]
        return [(products + bias).masked_fill(later, float("-inf")) for bias in biases]

    def attn_out_raw(self, v: Values) -> Sequence[Tensor]:
        return [self.call(self.block.family.out, v["z"].flatten(2))]

    def summed(self, v: Values) -> Sequence[Tensor]:
        out = self.block.module(self.block.family.out)
        bias = getattr(out, "bias", None)
        total = v["head_out"].sum(2)
        return [total if bias is None else total + brought(out, "bias", bias)]

    def attn_out(self, v: Values) -> Sequence[Tensor]:
        return self._added(v["attn_out_raw"], self.block.family.attn_post)

    def mlp_out(self, v: Values) -> Sequence[Tensor]:
        return self._added(v["mlp_out_raw"], self.block.family.mlp_post)

    def _added(self, value: Tensor, post: str) -> Sequence[Tensor]:
        return [self.call(post, value) if post else value * factor(self.block.config, self.block.family.multiplier)]

    def resid_mid(self, v: Values) -> Sequence[Tensor]:
        return [v["resid_pre"] + v["attn_out"]]

    def mlp_in(self, before: str, v: Values) -> Sequence[Tensor]:
        norm = self.block.family.resid_norm[0] or self.block.first(self.block.family.mlp_norm)
        return [self.call(norm, v[before]) if norm else v[before]]

    def up(self, name: str, v: Values) -> Sequence[Tensor]:
        named = self.block.named[name]
        with no_hooks():
            made = self.block.modules[named.point.module](v["mlp_in"])
        return [seen(made, [view for view in named.views if view[:2] != ("unflatten", 0)])]

    def mlp_post(self, v: Values) -> Sequence[Tensor]:
        gate, linear = v["mlp_pre"], v.get("mlp_pre_linear")
        acts = [module for path, module in self.block.modules.items() if self._activates(path)]
        made = [act(gate) for act in dict.fromkeys(acts)]
        return made if linear is None else [value * linear for value in made]

    def _activates(self, path: str) -> bool:
        inside = path.startswith(self.block.path + ".")
        return inside and any(part in path.rpartition(".")[2] for part in ("act", "gelu"))

    def down(self, v: Values) -> Sequence[Tensor]:
        return [self.call(self.block.family.down, v["mlp_post"])]

    def router(self, v: Values) -> Sequence[Tensor]:
        router = self.block.module(self.block.first(self.block.family.router))
        weight = getattr(router, "weight", None)
        if not isinstance(weight, Tensor):
            return []
        return [nn.functional.linear(v["mlp_in"], brought(router, "weight", weight))]

    def chosen(self, v: Values) -> Sequence[Tensor]:
        count = self.block.leaf(self.block.named["expert_ids"].point).dims[-1]
        return [v["router_logits"].float().softmax(-1).topk(int(count)).indices]

    def weights(self, v: Values) -> Sequence[Tensor]:
        count = self.block.leaf(self.block.named["expert_ids"].point).dims[-1]
        found = v["router_logits"].float().softmax(-1).topk(int(count)).values
        normal = getattr(self.block.config, "norm_topk_prob", True)
        return [found / found.sum(-1, keepdim=True) if normal else found]

    def experts(self, v: Values) -> Sequence[Tensor]:
        mlp = self.block.family.mlp
        rows = v["mlp_in"].flatten(0, 1)
        ids, weights = v["expert_ids"].flatten(0, 1), v["expert_weights"].flatten(0, 1)
        made = self.call(f"{mlp}.experts", rows, ids, weights.to(rows.dtype))
        if self.block.has(f"{mlp}.shared_expert"):
            gate = self.call(f"{mlp}.shared_expert_gate", rows).sigmoid()
            made = made + gate * self.call(f"{mlp}.shared_expert", rows)
        return [made.view_as(v["mlp_in"])]

    def resid_post(self, summed: Sequence[str], v: Values) -> Sequence[Tensor]:
        total = v[summed[0]]
        if self.block.family.resid_norm[0]:
            total = self.call(self.block.family.resid_norm[0], total)
        for name in summed[1:]:
            total = total + v[name]
        norm = self.block.family.resid_norm[1]
        return [self.call(norm, total) if norm else total]

    def mixed(self, v: Values) -> Sequence[Tensor]:
        norm = self.block.first(self.block.family.attn_norm)
        given = v["resid_pre"].to(self.block.module(norm).weight.dtype)  # type: ignore[arg-type]
        return [v["resid_pre"] + self.call("mixer", self.call(norm, given))]


def _computed(op: str, args: tuple[Any, ...]) -> Any:
    return kernels.execute(op, args, {})


def _itself(value: Tensor) -> Tensor:
    return value


def unmasked(scores: Tensor) -> Tensor:
    """Scores with zeros where they are masked."""
    return scores.float().masked_fill(scores <= _MASKED, 0)


def seen(value: Any, views: Sequence[View]) -> Any:
    """A value through views."""
    for op, *args in sized(views, 1):
        value = kernels.execute(op, (value, *args), {})
    return value


def spread(value: Tensor, heads: int) -> Tensor:
    """[batch, key heads, ...] with each head repeated for the queries that share it."""
    return value.repeat_interleave(heads // value.shape[1], 1)


def rotate(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions over the first dimensions, halves paired."""
    width = cos.shape[-1]
    part, rest = value[..., :width], value[..., width:]
    one, two = part.chunk(2, -1)
    turned = part * cos[:, None] + torch.cat((-two, one), -1) * sin[:, None]
    return torch.cat((turned, rest), -1)


def rotate_pairs(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions over the first dimensions, neighbours paired."""
    width = cos.shape[-1]
    part, rest = value[..., :width], value[..., width:]
    other = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    return torch.cat((part * cos[:, None] + other * sin[:, None], rest), -1)


def slopes(heads: int) -> Tensor:
    """ALiBi's slope of each head."""
    base = 2 ** (heads.bit_length() - 1)
    found = [2 ** (-8 * (i + 1) / base) for i in range(base)]
    found += [2 ** (-4 * (i + 1) / base) for i in range(0, 2 * (heads - base), 2)]
    return torch.tensor(found)
