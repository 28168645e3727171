"""Models beyond token ids, local: every module's values, writes and gradients against hooks by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import beyond
import numpy as np
import pytest
import torch
from beyond import FEEDS, cacheless, given, ours, pixels, stock
from interpose.errors import (
    BadArgument,
    IndexOutOfRange,
    InterposeError,
    ShapeMismatch,
    UnknownPoint,
)
from interpose.graph.limits import Limits
from interpose.graph.manifest import Leaf, decode_manifest, encode_manifest
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.validate import validate
from interpose.graph.values import Ref, TensorSpec
from interpose.runtime.engine import EngineJob
from torch import Tensor, nn
from transformers import BatchEncoding, BatchFeature
from twins import alive, close, same

ARCHS = list(FEEDS)
BATCHED = ["bert_base", "bert_classes", "clip_text", "vit", "vit_classes", "clip_vision", "llava", "gemma3_images"]
"""Whose rows are independent, so that jobs share forwards."""


def first(value: Any) -> Any:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value


class Caught:
    """Every module's first output tensor of one forward, some of them changed."""

    def __init__(self, model: nn.Module, edits: dict[str, Callable[[Tensor], Tensor]] | None = None) -> None:
        self.model, self.edits, self.seen = model, edits or {}, {}

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        handles = [module.register_forward_hook(self._hook(path)) for path, module in self.model.named_modules()]
        try:
            self.output = self.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return self.seen

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            value = first(output)
            if not isinstance(value, Tensor):
                return None
            if path not in self.edits:
                self.seen.setdefault(path, value.clone())
                return None
            new = self.edits[path](value)
            self.seen[path] = new
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook


def readable(arch: str) -> list[str]:
    """Modules called once whose first output is one tensor."""
    found = []
    for path, info in ours(arch).manifest.modules.items():
        layout = info.points.get("output")
        layout = first(layout) if isinstance(layout, tuple) else layout
        if path and isinstance(layout, Leaf) and len(info.events["exit"]) == 1:
            found.append(path)
    return found


def module(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def read(model: Any, path: str) -> Any:
    return first_of(module(model, path).points["output"])


def first_of(value: Any) -> Any:
    return value[0] if type(value).__name__ == "Nest" else value


def end(model: Any, arch: str) -> Any:
    """What a model makes in the end."""
    output = model.output
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if hasattr(stock(arch)(**given(arch)), name):
            return output if name == "logits" else getattr(output, name)
    raise AssertionError


def end_of(output: Any) -> Tensor:
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(output[name] for name in names if output.get(name) is not None)


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_every_module_is_that_of_the_library(arch: str) -> None:
    inputs = given(arch)
    caught = Caught(stock(arch))
    expected = caught(**cacheless(arch, inputs))
    model = ours(arch)
    paths = readable(arch)
    assert len(paths) > 20
    with model.trace(inputs):
        found = {path: read(model, path).save() for path in paths}
        last = end(model, arch).save()
    for path in paths:
        same(found[path], expected[path])
    same(last, end_of(caught.output))


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_a_write_is_a_hooks_write(arch: str) -> None:
    inputs = given(arch)
    model = ours(arch)
    lists = list(model.manifest.towers.values()) or [model.manifest.blocks]
    for blocks in lists:
        path = blocks[0]

        def change(value: Tensor) -> Tensor:
            new = value.clone()
            new[:, 2] = new[:, 1] * 1.5
            return new

        plain, by_hand = Caught(stock(arch)), Caught(stock(arch), {path: change})
        plain(**cacheless(arch, inputs))
        by_hand(**cacheless(arch, inputs))
        expected = end_of(by_hand.output)
        assert not torch.allclose(expected, end_of(plain.output), rtol=1e-3)
        with model.trace(inputs):
            h = module(model, path).points["output"][0]
            h[:, 2] = h[:, 1] * 1.5
            found = end(model, arch).save()
        same(found, expected)


@pytest.mark.parametrize(
    "arch", ["vit_classes", "clip_vision", "clip_text", "clip", "llava", "gemma3_images", "bert_classes"]
)
def test_gradients(arch: str) -> None:
    inputs = given(arch)
    model = ours(arch)
    lists = list(model.manifest.towers.values()) or [model.manifest.blocks]
    for blocks in lists:
        path, twin = blocks[0], stock(arch)
        leaf: dict[str, Tensor] = {}

        def cut(value: Tensor, leaf: dict[str, Tensor] = leaf) -> Tensor:
            leaf["h"] = value.detach().requires_grad_()
            return leaf["h"]

        caught = Caught(twin, {path: cut})
        caught(**cacheless(arch, inputs))
        end_of(caught.output).square().sum().backward()
        with model.trace(inputs):
            h = module(model, path).points["output"][0]
            loss = end(model, arch).square().sum()
            with loss.backward():
                found = h.grad.save()
        assert leaf["h"].grad is not None
        close(found, leaf["h"].grad, 1e-4)


def jobs_of(arch: str, seeds: list[int]) -> list[EngineJob]:
    return [job_of(arch, given(arch, 1 + seed % 2, seed)) for seed in seeds]


class Kept:
    def __init__(self) -> None:
        self.values: dict[int, Any] = {}

    def save(self, node: int, value: Any) -> None:
        self.values[node] = value.clone()

    def log(self, node: int, text: str) -> None: ...

    def tokens(self, run: int, step: int, ids: Any) -> None: ...

    def cancelled(self) -> bool:
        return False


def job_of(arch: str, inputs: dict[str, Tensor]) -> EngineJob:
    """Changes the first block of every list for its own rows, and saves every block's output."""
    manifest = ours(arch).manifest
    blocks = [path for blocks in (list(manifest.towers.values()) or [manifest.blocks]) for path in blocks]
    nodes: list[Node] = []
    for path in blocks:
        layout = manifest.modules[path].points["output"]
        point = Point(path, "output", (0,) if isinstance(layout, tuple) else ())
        nodes.append(Node(len(nodes), "read", point=point, invoke=0))
        if path.endswith("0"):
            nodes.append(Node(len(nodes), "mul", (Ref(len(nodes) - 1), 1.25)))
            nodes.append(Node(len(nodes), "write", ((), ..., Ref(len(nodes) - 1)), point=point, invoke=0))
        else:
            nodes.append(Node(len(nodes), "save", (Ref(len(nodes) - 1),), invoke=0))
    ids = inputs.get("input_ids")
    count = len(inputs["pixel_values"]) if ids is None else len(ids)
    rows = ((),) * count if ids is None else tuple(map(tuple, ids.tolist()))
    tensors = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    names = {name: f"{index:064x}" for index, name in enumerate(tensors)}
    specs = {names[n]: TensorSpec(tuple(v.shape), str(v.dtype).removeprefix("torch.")) for n, v in tensors.items()}
    graph = Graph((Run("trace", (Invoke(rows, names),)),), tuple(nodes), specs)
    return EngineJob(graph, {names[name]: value for name, value in tensors.items()}, Kept())


@pytest.mark.parametrize("arch", BATCHED)
def test_rows_in_company_are_as_alone(arch: str) -> None:
    engine = ours(arch)._access.local.engine
    assert engine.manifest.row_independent, engine.manifest.row_note
    jobs = jobs_of(arch, [1, 2, 3, 4])
    widths: list[int] = []
    handle = engine.loaded.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(next(iter(kwargs.values())))), with_kwargs=True
    )
    try:
        assert engine.run(jobs) == [None] * len(jobs)
    finally:
        handle.remove()
    assert len(widths) == 1, "they shared a forward"
    for job in jobs:
        (error,) = engine.run([alone := EngineJob(job.graph, job.attachments, Kept())])
        assert error is None
        for node, value in job.sink.values.items():
            close(value, alone.sink.values[node])


def test_an_images_places_are_its_own_prompts() -> None:
    """Else the features of one job's image would go to another's."""
    engine = ours("llava")._access.local.engine
    inputs = given("llava")
    wrong = {**inputs, "pixel_values": pixels(2)}
    good = job_of("llava", inputs)
    errors = engine.run([job_of("llava", wrong), good])
    assert isinstance(errors[0], BadArgument) and "places" in errors[0].message
    assert errors[1] is None and good.sink.values


def test_clip_takes_other_numbers_of_images_than_of_texts() -> None:
    model, twin = ours("clip"), stock("clip")
    assert not model.manifest.row_independent and "logits_per_image" in model.manifest.row_note
    inputs = {**given("clip", 3), "pixel_values": pixels(2)}
    with model.trace(inputs):
        scores = model.output.logits_per_image.save()
        vision = model.vision_model.encoder.layers[1].resid_post.save()
        text = model.text_model.encoder.layers[1].resid_post.save()
    with torch.no_grad():
        expected = twin(**inputs, output_hidden_states=True)
    same(scores, expected.logits_per_image)
    same(vision, expected.vision_model_output.hidden_states[-1])
    same(text, expected.text_model_output.hidden_states[-1])
    with pytest.raises(UnknownPoint, match=r"text_model\.encoder\.layers, vision_model"), model.trace(inputs):
        _ = model.layers


def test_prompts_as_they_come() -> None:
    """A tensor, an array, keywords, what processors and tokenizers return: all the same."""
    model = ours("vit_classes")
    image = pixels(2)
    with model.trace(image):
        expected = model.logits.save()
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((image.numpy(),), {}),
        ((), {"pixel_values": image}),
        (({"pixel_values": image.numpy().astype(np.float64)},), {}),
        ((BatchFeature({"pixel_values": image}),), {}),
    ]
    for args, kwargs in ways:
        with model.trace(*args, **kwargs):
            found = model.logits.save()
        same(found, expected)
    with model.trace() as t:
        with t.invoke(image[:1]):
            one = model.layers[0].output[0]
        with t.invoke(pixel_values=image[1:]):
            model.layers[0].output[0] = one
            moved = model.logits.save()
        with t.invoke():
            both = model.logits.save()
    close(moved, expected[:1])
    assert both.shape == expected.shape
    bert = ours("bert_base")
    inputs = given("bert_base")
    with bert.trace(BatchEncoding(inputs)):
        found = bert.output.last_hidden_state.save()
    with torch.no_grad():
        twin = stock("bert_base")
        same(found, twin(**inputs).last_hidden_state)
        assert not torch.allclose(found, twin(input_ids=inputs["input_ids"]).last_hidden_state, atol=1e-2)


def test_padding_of_a_tokenizer_takes_its_types_along() -> None:
    model, twin = ours("roberta"), stock("roberta")
    ids = torch.tensor([[9, 40, 41, 42, 43], [9, 50, 51, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    types = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    with model.trace(input_ids=ids, attention_mask=mask, token_type_ids=types):
        found = model.logits.save()
    with torch.no_grad():
        alone = [
            twin(input_ids=row[keep][None], token_type_ids=kind[keep][None]).logits
            for row, keep, kind in zip(ids, mask.bool(), types, strict=True)
        ]
    close(found[:1], alone[0])
    close(found[1:, 2:], alone[1])


def test_rows_of_other_lengths_where_the_first_position_counts() -> None:
    """Padding on the left would hide the class token: no numbers rather than wrong ones."""
    model = ours("bert_classes")
    with pytest.raises(BadArgument, match="different lengths can't share a run"), model.trace([[5, 6, 7], [8, 9]]):
        model.logits.save()
    with model.session():
        with model.trace([5, 6, 7]):
            one = model.logits.save()
        with model.trace([8, 9]):
            two = model.logits.save()
    with torch.no_grad():
        for found, row in ((one, [5, 6, 7]), (two, [8, 9])):
            close(found, stock("bert_classes")(input_ids=torch.tensor([row])).logits)


WRONG: dict[str, tuple[str, dict[str, Any], type[InterposeError], str]] = {
    "no such name": (
        "vit",
        {"pixel_values": pixels(1), "past_key_values": pixels(1)},
        BadArgument,
        "takes no input",
    ),
    "labels": (
        "vit",
        {"pixel_values": pixels(1), "labels": torch.tensor([1])},
        BadArgument,
        "takes no input 'labels'",
    ),
    "a switch": ("vit", {"pixel_values": pixels(1), "return_dict": False}, BadArgument, "takes no input"),
    "tokens": ("vit", {"input_ids": torch.tensor([[1, 2]])}, BadArgument, "takes no input 'input_ids'"),
    "nothing it needs": ("clip", {"input_ids": torch.tensor([[1, 2]])}, BadArgument, "needs pixel_values"),
    "integers": ("vit", {"pixel_values": pixels(1).long()}, BadArgument, "floating-point"),
    "another size": ("vit", {"pixel_values": torch.zeros(1, 3, 24, 25)}, ShapeMismatch, r"\[1, 3, 24, 24\]"),
    "another rank": ("vit", {"pixel_values": torch.zeros(3, 24, 24)}, ShapeMismatch, "where"),
    "no image": ("vit", {"pixel_values": torch.zeros(0, 3, 24, 24)}, BadArgument, "no rows"),
    "a type out of range": (
        "bert_base",
        {"input_ids": torch.tensor([[1, 2]]), "token_type_ids": torch.tensor([[0, 2]])},
        IndexOutOfRange,
        "0 to 1",
    ),
    "a negative type": (
        "bert_base",
        {"input_ids": torch.tensor([[1, 2]]), "token_type_ids": torch.tensor([[0, -1]])},
        IndexOutOfRange,
        "holds -1",
    ),
    "types of another length": (
        "bert_base",
        {"input_ids": torch.tensor([[1, 2]]), "token_type_ids": torch.tensor([[0, 1, 1]])},
        ShapeMismatch,
        "token_type_ids",
    ),
    "places without an image": ("llava", {"input_ids": torch.tensor([[9, 2, 40]])}, BadArgument, "none is given"),
    "an image without places": (
        "llava",
        {"input_ids": torch.tensor([[9, 40]]), "pixel_values": pixels(1)},
        BadArgument,
        "take 9 places",
    ),
    "patches without places": (
        "qwen2_vl",
        {**given("qwen2_vl"), "pixel_values": torch.zeros(32, 96)},
        BadArgument,
        "32 patches take 8 places",
    ),
    "a grid beside the patches": (
        "qwen2_vl",
        {**given("qwen2_vl"), "image_grid_thw": torch.tensor([[1, 4, 400]])},
        BadArgument,
        "can't have",
    ),
    "a grid of other sums": (
        "qwen2_vl",
        {**given("qwen2_vl"), "image_grid_thw": torch.tensor([[1, 2, 4]])},
        BadArgument,
        "counts 8 patches",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused(case: str) -> None:
    arch, inputs, kind, says = WRONG[case]
    model = ours(arch)
    with pytest.raises(kind, match=says), model.trace(inputs):
        (model.output.logits if FEEDS[arch] != "pixels" and "bert" not in arch else model.output).save()


def raw(arch: str, tensors: dict[str, tuple[tuple[int, ...], str]], rows: Any) -> Graph:
    names = {name: f"{index:064x}" for index, name in enumerate(tensors)}
    specs = {names[name]: TensorSpec(*spec) for name, spec in tensors.items()}
    return Graph((Run("trace", (Invoke(rows, names),)),), (), specs)


@pytest.mark.parametrize(
    ("arch", "tensors", "rows"),
    [
        ("vit", {"pixel_values": ((1, 3, 24, 24), "float32")}, ((), ())),
        ("vit", {"pixel_values": ((1, 3, 24, 24), "float32")}, ((1, 2),)),
        ("vit", {}, ((),)),
        ("vit", {"pixel_values": ((1, 3, 24, 24), "float32"), "attention_mask": ((1, 9), "int64")}, ((),)),
        ("vit", {"pixel_values": ((1, 3, 2**30, 24), "float32")}, ((),)),
        ("vit", {"pixel_values": ((1, 3, 24, 24), "complex64")}, ((),)),
        ("bert_base", {"token_type_ids": ((1, 2), "float32")}, ((1, 2),)),
        ("bert_base", {"token_type_ids": ((2, 2), "int64")}, ((1, 2),)),
        ("bert_base", {"inputs_embeds": ((1, 2, 64), "float32")}, ((1, 2),)),
        ("llava", {"pixel_values": ((2, 3, 24, 24), "float32")}, ((9, *[2] * 9),)),
        ("llava", {"position_ids": ((1, 2), "int64")}, ((1, 2),)),
    ],
)
def test_a_server_refuses_what_a_client_makes_up(arch: str, tensors: Any, rows: Any) -> None:
    with pytest.raises(InterposeError):
        validate(raw(arch, tensors, rows), ours(arch).manifest, Limits())


def test_values_are_checked_where_the_model_runs() -> None:
    engine = ours("bert_base")._access.local.engine
    bad, good = (job_of("bert_base", given("bert_base", 1, seed)) for seed in (1, 2))
    bad.attachments[f"{0:064x}"][0, 0] = 7  # type: ignore[index]
    errors = engine.run([bad, good])
    assert isinstance(errors[0], IndexOutOfRange) and errors[1] is None
    alive(*good.sink.values.values())


@pytest.mark.parametrize("arch", ["vit", "clip", "llava", "qwen2_vl"])
def test_a_manifest_says_what_a_model_takes(arch: str) -> None:
    manifest = ours(arch).manifest
    again = decode_manifest(encode_manifest(manifest))
    assert (again.inputs, again.towers, again.tokens) == (manifest.inputs, manifest.towers, manifest.tokens)
    assert (again.image_token, again.image_tokens) == (manifest.image_token, manifest.image_tokens)
    assert "pixel_values" in str(ours(arch))


def test_what_it_takes_counts() -> None:
    graph = job_of("vit", given("vit", 3)).graph
    found = validate(graph, ours("vit").manifest, Limits()).footprint
    assert (found.rows, found.longest) == (3, beyond.PLACES + 1)
    assert found.memory_bytes >= 3 * 3 * 24 * 24 * 4


# -- standard names of towers ------------------------------------------------------------------------------------

_ENCODER = {
    "attn_in": ("{attn}", "in"),
    "q": ("{attn}.q_proj", "out"),
    "k": ("{attn}.k_proj", "out"),
    "v": ("{attn}.v_proj", "out"),
    "z": ("{out}", "in"),
    "attn_out": ("{attn}", "out"),
    "resid_mid": ("{norm}", "in"),
    "mlp_in": ("mlp", "in"),
    "mlp_pre": ("mlp.fc1", "out"),
    "mlp_post": ("mlp.fc2", "in"),
    "mlp_out": ("mlp", "out"),
    "resid_pre": ("", "in"),
    "resid_post": ("", "out"),
}
_VIT = {"attn": "attention", "out": "attention.o_proj", "norm": "layernorm_after"}
_CLIP = {"attn": "self_attn", "out": "self_attn.out_proj", "norm": "layer_norm2"}
TOWERS = [
    ("vit_classes", "vit.layers", _VIT),
    ("clip_vision", "encoder.layers", _CLIP),
    ("clip_text", "encoder.layers", _CLIP),
    ("clip", "vision_model.encoder.layers", _CLIP),
    ("clip", "text_model.encoder.layers", _CLIP),
    ("llava", "model.vision_tower.encoder.layers", _CLIP),
    ("gemma3_images", "model.vision_tower.encoder.layers", _CLIP),
]


def at_hand(twin: Any, path: str, side: str, edit: Callable[[Tensor], Tensor] | None, seen: list[Tensor]) -> Any:
    """A hook that keeps a module's first input or output, as a value of its own, or changes it."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        value = args[0] if args else kwargs["hidden_states"]
        seen.append(value.clone())
        if edit is None:
            return None
        return ((edit(value), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edit(value)})

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        value = first(output)
        seen.append(value.clone())
        if edit is None:
            return None
        return (edit(value), *output[1:]) if isinstance(output, tuple) else edit(value)

    module = twin.get_submodule(path)
    if side == "in":
        return module.register_forward_pre_hook(enter, with_kwargs=True)
    return module.register_forward_hook(leave)


@pytest.mark.parametrize(("arch", "tower", "names"), TOWERS, ids=[f"{arch}-{tower}" for arch, tower, _ in TOWERS])
@torch.no_grad()
def test_standard_names_of_towers(arch: str, tower: str, names: dict[str, str]) -> None:
    model, twin, inputs = ours(arch), stock(arch), given(arch)
    block = f"{tower}.0"
    offered = set(model.manifest.named[block])
    assert set(_ENCODER) | {"pattern", "scores", "q_rot", "k_rot", "head_out"} <= offered
    plain = twin(**cacheless(arch, inputs))
    for name, (spot, side) in _ENCODER.items():
        path = f"{block}.{spot.format(**names)}".rstrip(".")
        seen: list[Tensor] = []
        # The stream between attention and MLP is held by the block too, which a hook on the norm wouldn't change.
        edit = None if name == "resid_mid" else lambda value: value * 1.5
        handle = at_hand(twin, path, side, edit, seen)
        try:
            changed = end_of(twin(**cacheless(arch, inputs)))
        finally:
            handle.remove()
        with model.trace(inputs):
            found = module(model, block).points[name].save()
        with model.trace(inputs):
            module(model, block).points[name][:] *= 1.5
            written = end(model, arch).save()
        same(found.reshape(seen[0].shape), seen[0])
        if edit is not None:
            same(written, changed)
        assert not torch.allclose(written, end_of(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("arch", "tower", "names"), TOWERS, ids=[f"{arch}-{tower}" for arch, tower, _ in TOWERS])
@torch.no_grad()
def test_patterns_of_towers(arch: str, tower: str, names: dict[str, str]) -> None:
    model, twin, inputs = ours(arch), stock(arch, "eager"), given(arch)
    seen: list[Tensor] = []
    path = f"{tower}.1.{names['attn']}"
    handle = twin.get_submodule(path).register_forward_hook(lambda _, args, output: seen.append(output[1].clone()))
    try:
        twin(**cacheless(arch, inputs))
    finally:
        handle.remove()
    with model.trace(inputs):
        pattern = module(model, f"{tower}.1").points["pattern"].save()
    same(pattern, seen[0])
