"""Language models that see: texts with images, local and remote, against the library's own forward and generate."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beyond import PLACES, given, ours, pixels, stock
from interpose import VisionLanguageModel
from interpose.errors import BadArgument, ConfigError, IndexOutOfRange, InterposeError, NotReached
from models import tiny
from PIL import Image
from serving import Served, serve
from torch import Tensor
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from twins import alive, close, same

SEEING = ["llava", "gemma3_images", "qwen2_vl"]


class Processor:
    """Called as the library's processors are, which need libraries for image files."""

    def __init__(self, arch: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tiny(arch))

    def __call__(self, *, text: Sequence[str], images: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        assert options["return_tensors"] == "pt"
        expanded = [line.replace("<image>", "<image>" * PLACES) for line in text]
        rows = [self.tokenizer(line)["input_ids"] for line in expanded]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        made = torch.stack([torch.as_tensor(np.asarray(image), dtype=torch.float32) for image in images])
        kinds = torch.zeros_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": made, "mm_token_type_ids": kinds}


@dataclass(frozen=True)
class Place:
    open: Callable[[str], VisionLanguageModel]
    options: dict[str, Any]


SERVED = ("llava", "gemma3_images", "qwen2_vl", "vit_classes", "clip")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    sources = [f"tiny-{arch}={tiny(arch)}" for arch in SERVED]
    with serve(*sources, data_dir=tmp_path_factory.mktemp("seeing")) as running:
        yield running


@cache
def _local(arch: str) -> VisionLanguageModel:
    torch.set_num_threads(1)
    return VisionLanguageModel(str(tiny(arch)), processor=Processor(arch))


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "local":
        return Place(_local, {})
    running: Served = request.getfixturevalue("server")

    def open_(arch: str) -> VisionLanguageModel:
        return VisionLanguageModel(
            f"tiny-{arch}", host=running.host, api_key=running.key, processor=Processor("llava")
        )

    return Place(open_, {"remote": True})


def test_a_text_with_an_image(place: Place) -> None:
    model = place.open("llava")
    image = pixels(1)[0].numpy()
    with model.trace("<image> The capital of France is", images=[image], **place.options):
        features = model.model.multi_modal_projector.output.save()
        tower = model.model.vision_tower.encoder.layers[1].resid_post.save()
        middle = model.layers[1].resid_post.save()
        logits = model.logits.save()
    inputs = Processor("llava")(text=["<image> The capital of France is"], images=[image], return_tensors="pt")
    inputs.pop("mm_token_type_ids")
    with torch.no_grad():
        expected = stock("llava")(**inputs, use_cache=False, output_hidden_states=True)
    same(logits, expected.logits)
    same(middle, expected.hidden_states[2])
    same(features, expected.image_hidden_states.view_as(features))
    assert tower.shape == (1, PLACES + 1, 48)


def test_what_an_image_is_seen_as_can_be_changed(place: Place) -> None:
    model = place.open("llava")
    image = pixels(1, 3)[0]
    text = "<image> The capital of France is"
    with model.trace(text, images=image[None], **place.options):
        model.model.multi_modal_projector.output[:, 4:] = 0
        logits = model.logits.save()
    twin = stock("llava")
    inputs = Processor("llava")(text=[text], images=[image], return_tensors="pt")
    inputs.pop("mm_token_type_ids")

    def blind(module: Any, args: Any, output: Tensor) -> Tensor:
        new = output.clone()
        new[:, 4:] = 0
        return new

    with torch.no_grad():
        plain = twin(**inputs, use_cache=False).logits
        handle = twin.model.multi_modal_projector.register_forward_hook(blind)
        try:
            expected = twin(**inputs, use_cache=False).logits
        finally:
            handle.remove()
    assert not torch.allclose(plain, expected, rtol=1e-3)
    same(logits, expected)


def test_prompts_with_two_images_one_and_none_share_a_forward(place: Place) -> None:
    model = place.open("llava")
    prompts = [
        ("<image> and <image> differ", pixels(2, 1)),
        ("The <image> of France", pixels(1, 2)),
        ("No image", None),
    ]

    def read(text: str, images: Any) -> Any:
        with model.trace(text, images=None if images is None else list(images), **place.options):
            return model.logits[:, -1].save()

    alone = [read(text, images) for text, images in prompts]
    towers = []
    together = []
    with model.trace(**place.options) as t:
        for text, images in prompts:
            with t.invoke(text, images=None if images is None else list(images)):
                together.append(model.logits[:, -1].save())
                if images is not None:
                    towers.append(model.model.vision_tower.encoder.layers[0].resid_post.save())
    for found, expected in zip(together, alone, strict=True):
        close(found, expected)
    assert [len(tower) for tower in towers] == [2, 1]
    alive(*towers)


@pytest.mark.parametrize("arch", SEEING)
def test_generation_is_the_librarys(place: Place, arch: str) -> None:
    model = place.open(arch)
    inputs = given(arch)
    with model.generate(inputs, max_new_tokens=6, **place.options) as t:
        ids = t.result.save()
    expected = stock(arch).generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(ids, expected)
    other = {**inputs, "pixel_values": inputs["pixel_values"] * -3}
    moved = stock(arch)(**other).logits
    assert not torch.allclose(moved, stock(arch)(**inputs).logits, rtol=1e-3), "the image matters"


@pytest.mark.parametrize("arch", ["llava", "gemma3_images"])
def test_generations_that_see_share_their_steps(arch: str) -> None:
    model = _local(arch)
    several = [given(arch, 1, 1), given(arch, 2, 2), given(arch, 1, 3)]
    found = []
    with model.session():
        for inputs in several:
            with model.generate(inputs, max_new_tokens=4) as t:
                with t.all():
                    model.layers[0].output[0][:, -1] *= 1.1
                found.append(t.result.save())
    for inputs, ids in zip(several, found, strict=True):
        with model.generate(inputs, max_new_tokens=4) as t:
            with t.all():
                model.layers[0].output[0][:, -1] *= 1.1
            alone = t.result.save()
        assert torch.equal(ids, alone)


def test_steering_a_generation_that_sees(place: Place) -> None:
    model, twin = place.open("llava"), stock("llava")
    inputs = given("llava", seed=5)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1)) * 4
    with model.generate(inputs, max_new_tokens=5, **place.options) as t:
        with t.all():
            model.layers[1].output[0][:, -1] += vector
        ids = t.result.save()

    def steer(module: Any, args: Any, output: Tensor) -> Tensor:
        new = output.clone()
        new[:, -1] += vector
        return new

    plain = twin.generate(**inputs, max_new_tokens=5, do_sample=False)
    handle = twin.model.language_model.layers[1].register_forward_hook(steer)
    try:
        expected = twin.generate(**inputs, max_new_tokens=5, do_sample=False)
    finally:
        handle.remove()
    assert not torch.equal(plain, expected)
    assert torch.equal(ids, expected)


def test_gradients_with_respect_to_what_is_seen(place: Place) -> None:
    model, twin = place.open("llava"), stock("llava")
    inputs = given("llava", seed=2)
    with model.trace(inputs, **place.options):
        features = model.model.multi_modal_projector.output
        loss = model.logits[0, -1].log_softmax(-1)[33]
        with loss.backward():
            found = features.grad.save()
    leaf: list[Tensor] = []

    def cut(module: Any, args: Any, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    handle = twin.model.multi_modal_projector.register_forward_hook(cut)
    try:
        twin(**inputs).logits[0, -1].log_softmax(-1)[33].backward()
    finally:
        handle.remove()
    assert leaf[0].grad is not None
    close(found, leaf[0].grad, 1e-4)


def test_patches_of_any_size(place: Place) -> None:
    """Images whose number of places is their own run alone, and come out as the library's."""
    model, twin = place.open("qwen2_vl"), stock("qwen2_vl")
    token = ours("qwen2_vl").manifest.image_token
    ids = torch.tensor([[9, *[token] * 6, 40, 41, *[token] * 4, 42]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == token).long(),
        "pixel_values": torch.randn(40, 96, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4]]),
    }
    with model.trace(inputs, **place.options):
        logits = model.logits.save()
        merged = model.model.visual.merger.output.save()
    with torch.no_grad():
        expected = twin(**inputs, attention_mask=torch.ones_like(ids)).logits
    close(logits, expected)
    assert merged.shape == (10, 64)
    with model.generate([5, 6, 7], max_new_tokens=3, **place.options) as t:
        after = t.result.save()
    alone = twin.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert torch.equal(after, alone), "nothing is left of the images before"


def test_a_session_and_a_program_carry_images(place: Place, tmp_path: Any) -> None:
    from interpose import Program

    model = place.open("llava")
    one, two = given("llava", seed=1), given("llava", seed=2)
    with model.session(**place.options):
        with model.trace(one):
            seen = model.model.multi_modal_projector.output
        with model.trace(two):
            model.model.multi_modal_projector.output = seen
            moved = model.logits.save()
    with model.trace({**two, "pixel_values": one["pixel_values"]}, **place.options) as t:
        expected = t.name("logits", model.logits)
        program = t.graph
    close(moved, expected)
    again = Program.load(program.save(tmp_path / "sees.json"))
    assert "pixel_values=float32[1, 3, 24, 24]" in str(again)
    same(again.run(model, remote=bool(place.options))["logits"], expected)
    other = again.run(model, prompt=two, remote=bool(place.options))["logits"]
    assert not torch.allclose(other, expected, rtol=1e-3)


def test_a_tower_without_an_image_is_not_reached(place: Place) -> None:
    model = place.open("llava")
    with pytest.raises(NotReached), model.trace([5, 6, 7], **place.options):
        model.model.vision_tower.encoder.layers[0].resid_post.save()


def test_what_is_missing_is_said() -> None:
    model = _local("llava")
    with pytest.raises(BadArgument, match="go with a text"), model.trace([5, 6], images=list(pixels(1))):
        pass
    with pytest.raises(BadArgument, match="take 9 places"), model.trace("no place", images=list(pixels(1))):
        pass
    bare = VisionLanguageModel(stock("llava"))
    with pytest.raises(ConfigError, match="has no processor"), bare.trace("<image>", images=list(pixels(1))):
        pass
    unknown = VisionLanguageModel(str(tiny("clip")))
    with pytest.raises(ConfigError, match="processor"):
        _ = unknown.processor


def test_the_models_own_processor(tmp_path: Path) -> None:
    """The transformers library's, saved beside the model: a picture in, its numbers against the library's own."""
    folder = tmp_path / "tiny-llava"
    shutil.copytree(tiny("llava"), folder)
    twin = stock("llava")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    LlavaProcessor(
        pictures,
        AutoTokenizer.from_pretrained(folder),
        patch_size=twin.config.vision_config.patch_size,
        vision_feature_select_strategy=twin.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)
    model = VisionLanguageModel(str(folder))
    noise = np.random.default_rng(0).integers(0, 255, (2, 40, 50, 3), dtype=np.uint8)
    found = []
    for picture in map(Image.fromarray, noise):
        with model.trace("<image> The capital of France is", images=picture):
            found.append(model.logits.save())
        made = model.processor(text=["<image> The capital of France is"], images=[picture], return_tensors="pt")
        with torch.no_grad():
            same(found[-1], twin(**made).logits)
    assert not torch.allclose(*found)


# -- through a server --------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import numpy as np
from interpose import LanguageModel
model = LanguageModel("tiny-vit_classes", host=sys.argv[1], api_key=sys.argv[2])
image = np.linspace(-1, 1, 3 * 24 * 24, dtype=np.float32).reshape(1, 3, 24, 24)
with model.trace(pixel_values=image, remote=True):
    model.layers[0].resid_post[:, 0] *= 2.0
    logits = model.logits.save()
assert type(logits.value) is np.ndarray or isinstance(np.asarray(logits), np.ndarray)
print(",".join(f"{float(x):.6f}" for x in np.asarray(logits)[0]))
"""


def test_a_client_without_torch_sends_pixels(server: Served) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, server.host, server.key], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = torch.tensor([float(part) for part in done.stdout.split(",")])
    twin = stock("vit_classes")
    image = torch.linspace(-1, 1, 3 * 24 * 24).view(1, 3, 24, 24)

    def double(module: Any, args: Any, output: Any) -> Any:
        new = output.clone()
        new[:, 0] *= 2.0
        return new

    with torch.no_grad():
        plain = twin(image).logits[0]
        handle = twin.vit.layers[0].register_forward_hook(double)
        try:
            expected = twin(image).logits[0]
        finally:
            handle.remove()
    assert not torch.allclose(plain, expected, rtol=1e-3)
    assert torch.allclose(found, expected, atol=1e-4)


def test_clip_on_a_server(server: Served) -> None:
    model = VisionLanguageModel("tiny-clip", host=server.host, api_key=server.key)
    inputs = {**given("clip", 3), "pixel_values": pixels(2)}
    with model.trace(inputs, remote=True):
        scores = model.output.logits_per_image.save()
        model.text_model.encoder.layers[0].resid_post[:, 0] *= 1.0
    with torch.no_grad():
        same(scores, stock("clip")(**inputs).logits_per_image)


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ({"pixel_values": torch.zeros(1, 3, 24, 24), "use_cache": torch.ones(1)}, BadArgument),
        ({"pixel_values": torch.full((1, 3, 24, 24), float("nan"))}, None),
        ({"pixel_values": torch.zeros(1, 3, 24, 24), "output_attentions": torch.ones(1)}, BadArgument),
    ],
)
def test_a_server_takes_what_its_model_takes(
    server: Served, inputs: Any, kind: type[InterposeError] | None
) -> None:
    model = VisionLanguageModel("tiny-vit_classes", host=server.host, api_key=server.key)
    if kind is None:
        with model.trace(inputs, remote=True):
            logits = model.logits.save()
        assert torch.isnan(logits).all()
        return
    with pytest.raises(kind), model.trace(inputs, remote=True):
        model.logits.save()


def test_indices_are_checked_before_anything_is_sent(server: Served) -> None:
    model = VisionLanguageModel("tiny-qwen2_vl", host=server.host, api_key=server.key)
    wrong = {**given("qwen2_vl"), "mm_token_type_ids": torch.full((1, 11), 3)}
    with pytest.raises(IndexOutOfRange), model.trace(wrong, remote=True):
        pass
