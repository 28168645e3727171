"""TransformerLens's ways to run a model, over a trace: `run_with_cache`, `run_with_hooks`, names of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from .errors import BadArgument, UnknownOp, UnknownPoint
from .graph.manifest import Manifest
from .graph.named import LENS, spelled

Filter: TypeAlias = "str | Sequence[str] | Callable[[str], bool] | None"
Hook: TypeAlias = "Callable[..., Any]"

_ALSO = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_PARTS = {
    **dict.fromkeys(("q", "k", "v", "z", "rot_q", "rot_k", "attn_scores", "pattern", "result"), "attn"),
    **dict.fromkeys(("pre", "pre_linear", "post", "mid", "expert_weights", "expert_indices"), "mlp"),
}


_IGNORED = frozenset({"reset_hooks_end", "clear_contexts", "device", "return_cache_object"})
_REFUSED = {
    "bwd_hooks": "gradients are read and written in a block, in with loss.backward():",
    "incl_bwd": "gradients are read in a block, in with loss.backward():",
    "stop_at_layer": "a forward ends by itself after what is asked for; return_type=None asks for no logits",
    "pos_slice": "index the values of a block before they are saved",
}


def act_name(name: str, layer: int | None = None, part: str | None = None) -> str:
    """An activation's full name: ("pattern", 5) is "blocks.5.attn.hook_pattern"."""
    if "." in name or name.startswith("hook_"):
        return name
    part = {"a": "attn", "m": "mlp"}.get(part or "", part)
    name = _ALSO.get(name, name)
    if name in ("normalized", "scale"):
        part = part or ("ln_final" if layer is None else "ln1")
    part = part or _PARTS.get(name)
    whole = ".".join(filter(None, (part, f"hook_{name}")))
    return whole if layer is None else f"blocks.{layer}.{whole}"


def names(manifest: Manifest) -> Iterator[str]:
    """Every activation the model has, in the order of a forward."""
    yield from (name for name in ("hook_embed", "hook_pos_embed") if name[5:] in manifest.named.get("", {}))
    for index, path in enumerate(manifest.blocks):
        offered = manifest.named.get(path, {})
        yield from (f"blocks.{index}.{name}" for name, (ours, _) in LENS.items() if ours in offered)


@dataclass
class HookPoint:
    """What a hook is told of where it is. `ctx` is kept between the hooks of one run at one name."""

    name: str
    ctx: dict[Any, Any] = field(default_factory=dict)

    def layer(self) -> int:
        return int(self.name.split(".")[1])


class ActivationCache(dict[str, Any]):
    """Saved values by TransformerLens's names: `cache["blocks.5.attn.hook_pattern"]`, `cache["pattern", 5]`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self._layers = layers

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self)}"

    def __missing__(self, key: Any) -> Any:
        name, layer, part = (*key, None, None)[:3] if isinstance(key, tuple) else (key, None, None)
        layer = layer + self._layers if isinstance(layer, int) and layer < 0 else layer
        full = act_name(str(name), layer, part)
        if full not in self:
            spelled(full)
            raise UnknownPoint(f"the cache holds no {full}; names_filter= chose {', '.join(list(self)[:3])}, ...")
        return self[full]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownOp(
            f"a cache has no {name!r}: it is a dict of tensors by name; stack_activation(name) gives all layers' "
            "values, what a block adds is under attn_out and mlp_out, what a head adds under result"
        )

    def stack_activation(self, name: str, layer: int = -1, sublayer_type: str | None = None) -> Any:
        """All layers' values of a name, [layers, ...]; with `layer`, those before it."""
        count = self._layers if layer < 0 else layer
        values = [self[act_name(name, index, sublayer_type)] for index in range(count)]
        if values and hasattr(values[0], "detach"):
            from .tracing.torch_face import stacked

            return stacked(values)
        return np.stack([np.asarray(value) for value in values])


def run_with_cache(
    model: Any,
    prompt: Any,
    wanted: Filter = None,
    *,
    return_type: str | None = "logits",
    remove_batch_dim: bool = False,
    **options: Any,
) -> tuple[Any, ActivationCache]:
    """See `LanguageModel.run_with_cache`."""
    block = _block(model, prompt, options)
    manifest = block.recorder.manifest
    cache = ActivationCache(len(manifest.blocks))
    chosen = _chosen(manifest, wanted)
    with block:
        for name in chosen:
            value = model.points[name]
            cache[name] = (value[0] if remove_batch_dim else value).save()
        return _returned(model, prompt, return_type), cache


def run_with_hooks(
    model: Any,
    prompt: Any,
    hooks: Sequence[tuple[Any, Hook]],
    *,
    return_type: str | None = "logits",
    **options: Any,
) -> Any:
    """See `LanguageModel.run_with_hooks`."""
    block = _block(model, prompt, options)
    manifest = block.recorder.manifest
    order = {name: index for index, name in enumerate(names(manifest))}
    places = [(name, hook) for wanted, hook in hooks for name in _chosen(manifest, wanted)]
    points = {name: HookPoint(name) for name, _ in places}
    with block:
        for name, hook in sorted(places, key=lambda place: order.get(place[0], len(order))):
            value = model.points[name]
            given = hook(value, hook=points[name])
            if given is not None and given is not value:
                model.points[name] = given
        return _returned(model, prompt, return_type)


def _block(model: Any, prompt: Any, options: Mapping[str, Any]) -> Any:
    for name, value in options.items():
        if name in _REFUSED and value not in (None, False, ()):
            raise BadArgument(f"{name} isn't taken here: {_REFUSED[name]}")
    passed = {name: value for name, value in options.items() if name not in _REFUSED and name not in _IGNORED}
    return model.trace(prompt, **passed)


def _chosen(manifest: Manifest, wanted: Filter) -> list[str]:
    """The names a filter stands for."""
    if wanted is None:
        wanted = _usual
    if callable(wanted):
        return list(filter(wanted, names(manifest)))
    return [wanted] if isinstance(wanted, str) else list(wanted)


def _usual(name: str) -> bool:
    # One tensor for each head and position: asked for by name alone.
    return not name.endswith("hook_result")


def _returned(model: Any, prompt: Any, kind: str | None) -> Any:
    if kind not in ("logits", "loss", "both", None):
        raise BadArgument(f'return_type is "logits", "loss", "both" or None, not {kind!r}')
    if kind is None:
        return None
    logits = model.output
    if kind == "logits":
        return logits.save()
    recorder = model._recording()
    rows = recorder.runs[-1].invokes[0].rows
    if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        raise BadArgument("a loss needs rows of one length, of two tokens or more")
    ids = np.array(rows, dtype=np.int64)[:, 1:, None]
    loss = -logits[:, :-1].log_softmax(-1).gather(-1, recorder.value(recorder.arg(ids).id)).mean()
    return loss.save() if kind == "loss" else (logits.save(), loss.save())
