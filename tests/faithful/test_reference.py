"""Every code block of the text the project was asked for, local and remote, against the same thing by hand.

The text lies beside this repository, not in it, and is read when the tests run. Only the import, the models' names
and where a block runs are changed; names a block leaves undefined are supplied.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import shutil
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import decode
from interpose import CONFIG, LanguageModel
from interpose.errors import DeferredError, NotSaved, UnknownModule
from models import tiny
from serving import Served, serve
from transformers import AutoModelForCausalLM, AutoTokenizer
from twins import Edit, alive, close, run, same

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"
FENCE = re.compile(r"^(#{2,3}) ([^\n]*)$|^```(\w+)\n(.*?)^```$", re.M | re.S)

GPT2, LLAMA, DEEP = "a-gpt2", "a-llama", "a-deep-gpt2"
IDS = {
    "openai-community/gpt2": GPT2,
    "gpt2": GPT2,
    "meta-llama/Llama-3.1-8B": LLAMA,
    "meta-llama/Llama-3.1-70B": LLAMA,
}
"""The models the text names -> those that exist here."""

WORDS = (" cat", " sat", " on", " dog", " ran", " through", " jumps")
"""One token each for GPT-2, so that prompts of equal length there are so here."""

NOT_OURS = {"installation": "how another library is installed; ours is in the README, where a test runs it"}


def found() -> dict[str, str]:
    """The code blocks, by the headings over them and, after the first under one, a number."""
    blocks: dict[str, str] = {}
    for file in sorted(REFERENCE.glob("*.md")):
        chapter = section = ""
        for level, heading, _, text in FENCE.findall(file.read_text()):
            if level:
                name = re.sub(r"\W+", "-", heading.lower()).strip("-")
                chapter, section = (name, "") if level == "##" else (chapter, name)
                continue
            key = f"{chapter}/{section}" if section else chapter
            number = sum(other == key or other.startswith(f"{key}#") for other in blocks)
            blocks[f"{key}#{number + 1}" if number else key] = text
    return blocks


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of the families the text uses, with as many layers as it reads."""
    gpt2 = tmp_path_factory.mktemp("reference") / GPT2
    shutil.copytree(tiny("gpt2", n_layer=12, vocab_size=400 + len(WORDS)), gpt2)
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.add_tokens(list(WORDS))
    tokenizer.save_pretrained(gpt2)
    return {
        GPT2: gpt2,
        LLAMA: tiny("llama", num_hidden_layers=42),
        DEEP: tiny("gpt2", n_layer=100, n_embd=32, n_inner=48),
    }


@pytest.fixture(scope="module")
def server(homes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    sources = [f"{name}={folder}" for name, folder in homes.items()]
    with serve(*sources, data_dir=tmp_path_factory.mktemp("served")) as served:
        yield served


@dataclass
class Block:
    """One code block and where it runs."""

    name: str
    text: str
    homes: dict[str, Path]
    remote: bool
    key: str = ""
    printed: str = field(default="", init=False)

    @property
    def file(self) -> str:
        return f"<{self.name}>"

    def source(self, name: str) -> str:
        return name if self.remote else str(self.homes[name])

    def open(self, name: str) -> Any:
        return LanguageModel(self.source(name))

    def adapted(self, text: str) -> str:
        text = text.replace("from nnsight import", "from interpose import").replace("your_key", self.key)
        for named, ours in IDS.items():
            text = text.replace(f'"{named}"', repr(self.source(ours)))
        return re.sub(r"\.trace\((.*?)\)", self._placed, text)

    def _placed(self, opened: re.Match[str]) -> str:
        """The arguments of a trace, to run it here or there."""
        given = [part for part in opened[1].split(", ") if part and part != "remote=True"]
        return f".trace({', '.join([*given, 'remote=True'] if self.remote else given)})"

    def run(self, text: str | None = None, **names: Any) -> dict[str, Any]:
        """Run it, or a part of it, with these names supplied; returns all names afterwards."""
        adapted = self.adapted(self.text if text is None else text)
        linecache.cache[self.file] = (len(adapted), None, adapted.splitlines(True), self.file)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                exec(compile(adapted, self.file, "exec"), names)
            finally:
                self.printed = out.getvalue()
        return names

    @property
    def parts(self) -> list[str]:
        """What blank lines separate."""
        return [part for part in self.text.split("\n\n") if part.strip()]

    def twin(self, name: str, attention: str = "sdpa") -> Twin:
        """The model as the transformers library loads it."""
        folder = self.homes[name]
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
        return Twin(model, AutoTokenizer.from_pretrained(folder))


@dataclass(frozen=True)
class Twin:
    model: Any
    tokenizer: Any

    def inputs(self, *prompts: str) -> dict[str, torch.Tensor]:
        """For prompts of one length."""
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"] for prompt in prompts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def run(self, prompt: str, edits: Mapping[str, Edit] | None = None) -> dict[str, torch.Tensor]:
        return run(self.model, self.inputs(prompt), edits)


Case = Callable[[Block], None]
CASES: dict[str, Case] = {}


def block(name: str) -> Callable[[Case], Case]:
    def enter(case: Case) -> Case:
        CASES[name] = case
        return case

    return enter


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served | None]:
    """Remotely, host and key are found where the text's users keep them."""
    served: Served | None = None
    monkeypatch.setenv("NDIF_API_KEY", "")  # one of the blocks sets it
    if request.param == "remote":
        served = request.getfixturevalue("server")
        monkeypatch.setenv("NDIF_HOST", served.host)
        monkeypatch.setenv("NDIF_API_KEY", served.key)
    yield served
    CONFIG.reset()


def layer(index: int) -> str:
    return f"transformer.h.{index}"


def scaled(hidden: torch.Tensor) -> torch.Tensor:
    new = hidden.clone()
    new[:, -1, :] *= 1.5
    return new


@block("key-value-proposition")
def the_same_code_twice(block: Block) -> None:
    local, remote = block.parts
    names = block.run(local, model=block.open(GPT2))
    same(names["hidden"], block.twin(GPT2).run("Hello world")[layer(5)])
    names = block.run(remote, model=block.open(LLAMA))
    same(names["hidden"], block.twin(LLAMA).run("Hello world")["model.layers.40"])


@block("core-concepts/languagemodel-wrapper")
def wrapping(block: Block) -> None:
    model = block.run()["model"]
    assert model._access._local is None  # nothing is loaded before it is needed
    assert len(model.model.layers) == 42
    assert "LlamaDecoderLayer" in repr(model)


@block("core-concepts/tracing-context")
def tracing(block: Block) -> None:
    names = block.run()
    twin, prompt = block.twin(GPT2, "eager"), "The Eiffel Tower is in"
    plain = twin.run(prompt)
    zeroed = twin.run(prompt, {layer(8): torch.zeros_like})
    assert not torch.equal(plain[""], zeroed[""])
    same(names["hidden_states"], plain[layer(5)])
    same(names["logits"], zeroed[""])
    with torch.no_grad():
        patterns = twin.model(**twin.inputs(prompt), output_attentions=True).attentions
    same(names["attn"], patterns[5][0, 0])
    assert block.printed.strip() == str(plain[layer(5)].shape)


@block("core-concepts/proxy-objects")
def deferring(block: Block) -> None:
    names = block.run(model=block.open(GPT2))
    hidden = block.twin(GPT2).run("Hello")[layer(5)]
    same(names["h5_saved"], hidden.mean(dim=-1))
    with pytest.raises(NotSaved):
        _ = names["h5_out"] + 1


@block("workflow-1-activation-analysis/step-by-step")
def analysing(block: Block) -> None:
    names = block.run()
    twin, prompt = block.twin(GPT2, "eager"), "The capital of France is"
    plain = twin.run(prompt)
    with torch.no_grad():
        patterns = twin.model(**twin.inputs(prompt), output_attentions=True).attentions
    assert len(names["layer_outputs"]) == len(names["attn_patterns"]) == 12
    for index in range(12):
        same(names["layer_outputs"][index], plain[layer(index)])
        same(names["attn_patterns"][index], patterns[index][0, 0])
        assert f"Layer {index} norm: {plain[layer(index)].norm().item():.3f}\n" in block.printed
    best = torch.softmax(plain[""][0, -1], dim=-1).topk(5)
    shown = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    assert block.printed.endswith("".join(f"{twin.tokenizer.decode([id])}: {prob:.3f}\n" for id, prob in shown))


@block("workflow-2-activation-patching/step-by-step")
def patching(block: Block) -> None:
    names = block.run()
    twin = block.twin(GPT2)
    clean, corrupted = (twin.run(names[kind]) for kind in ("clean_prompt", "corrupted_prompt"))
    expected = twin.run(names["corrupted_prompt"], {layer(8): lambda _: clean[layer(8)]})
    same(names["clean_hidden"], clean[layer(8)])
    assert not torch.equal(expected[""], corrupted[""])
    same(names["patched_logits"], expected[""])
    same(names["patched_logits"], clean[""])  # all positions: nothing of the corrupted run is left after layer 8
    probs = torch.softmax(clean[""][0, -1], dim=-1)
    ids = [twin.tokenizer.encode(f" {city}")[0] for city in ("Paris", "Rome")]
    assert block.printed == f"Paris prob: {probs[ids[0]].item():.3f}\nRome prob: {probs[ids[1]].item():.3f}\n"


@block("workflow-2-activation-patching/systematic-patching-sweep")
def sweeping(block: Block) -> None:
    clean, corrupted = "The Eiffel Tower is in", "The Colosseum is in"
    model, twin = block.open(GPT2), block.twin(GPT2)
    with model.trace(clean, remote=block.remote):
        cache = [each.output[0].save() for each in model.transformer.h]
    length = cache[0].shape[1]
    assert length == twin.inputs(corrupted)["input_ids"].shape[1]
    paris, rome = (model.tokenizer.encode(f" {city}")[0] for city in ("Paris", "Rome"))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, paris] - logits[0, -1, rome]

    supplied = {"model": model, "torch": torch, "clean_hidden": cache, "seq_len": length, "corrupted": corrupted}
    results = block.run(**supplied, compute_metric=metric)["results"]
    source, expected = twin.run(clean), torch.zeros(12, length)
    for index in range(12):
        for position in range(length):

            def edit(hidden: torch.Tensor, index: int = index, position: int = position) -> torch.Tensor:
                new = hidden.clone()
                new[:, position, :] = source[layer(index)][:, position, :]
                return new

            expected[index, position] = metric(twin.run(corrupted, {layer(index): edit})[""])
    assert (expected - metric(twin.run(corrupted)[""])).abs().max() > 0.1
    close(results, expected)


@block("workflow-3-remote-execution-with-ndif/step-by-step")
def far_away(block: Block) -> None:
    names = block.run()
    twin = block.twin(LLAMA)
    plain = twin.run("The meaning of life is")
    same(names["layer_40_out"], plain["model.layers.40"])
    same(names["logits"], plain[""])
    ids = twin.inputs("What is 2+2?")["input_ids"][0].tolist()
    # Outside an `iter` block the change belongs to the first step, that of the prompt.
    expected = decode(twin.model, ids, 50, {(0, "model.layers.20"): scaled})
    assert not torch.equal(expected.tokens, decode(twin.model, ids, 50).tokens)
    output = names["output"]
    assert output.shape[0] == 1
    assert output.shape[1] > len(ids)
    assert output[0].tolist() == expected.tokens[0, : output.shape[1]].tolist()
    assert output.shape[1] == len(ids) + 50 or output[0, -1] == twin.tokenizer.eos_token_id


@block("workflow-3-remote-execution-with-ndif/ndif-setup")
def keys(block: Block) -> None:
    CONFIG.reset()
    block.key = block.key or "ip_none"
    first, _, second = block.text.partition("# Or")
    block.run(first)
    assert block.key == CONFIG.API_KEY
    CONFIG.API_KEY = "another"
    block.run(f"# Or{second}")
    assert block.key == CONFIG.API_KEY
    if block.remote:
        model = block.open(GPT2)
        with model.trace("Hello", remote=True):
            logits = model.output.save()
        same(logits, block.twin(GPT2).run("Hello")[""])


@block("workflow-4-cross-prompt-activation-sharing")
def sharing(block: Block) -> None:
    names = block.run()
    twin = block.twin(GPT2)
    inputs = twin.inputs("The cat sat on the", "The dog ran through the")
    assert inputs["input_ids"].shape == (2, 5)

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:1].repeat(2, 1, 1)

    plain, expected = run(twin.model, inputs), run(twin.model, inputs, {layer(6): edit})
    assert not torch.equal(plain[""][1], expected[""][1])
    same(names["cat_hidden"], plain[layer(6)][:1])
    same(names["dog_with_cat"], expected[""][1:])


@block("workflow-5-gradient-based-analysis")
def differentiating(block: Block) -> None:
    names = block.run()
    twin, caught = block.twin(GPT2), []

    def keep(module: Any, args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        caught[0].retain_grad()

    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(twin.model.get_submodule(layer(5)).register_forward_hook(keep).remove)
        logits = twin.model(**twin.inputs("The quick brown fox")).logits
    (-logits[0, -1, twin.tokenizer.encode(" jumps")[0]]).backward()
    close(names["grad"], caught[0].grad, 1e-5)
    same(names["hidden"].detach(), caught[0].detach())
    assert f"Gradient norm: {caught[0].grad.norm().item():.3f}" in block.printed


@block("common-issues-solutions/issue-module-path-differs-between-models")
def other_paths(block: Block) -> None:
    gpt2, llama, solution = block.parts
    for text, name, path, width in ((gpt2, GPT2, layer(5), 64), (llama, LLAMA, "model.layers.5", 64)):
        model = block.open(name)
        with pytest.raises(DeferredError, match=r"model\.trace"):
            block.run(text, model=model)
        code, line = text.rsplit("\n", 1) if text.strip().count("\n") else ("", text)
        shown = textwrap.indent(f"hidden = {line.strip()}.save()", "    ")
        names = block.run(f"{code}\nwith model.trace('Hello'):\n{shown}", model=model)
        assert names["hidden"].shape[-1] == width
        same(names["hidden"], block.twin(name).run("Hello")[path])
        block.run(solution, model=model)
        for part in path.replace(".5", "").split("."):
            assert part in block.printed


@block("common-issues-solutions/issue-forgetting-to-save")
def forgetting(block: Block) -> None:
    model = block.open(GPT2)
    with pytest.raises(NotSaved, match=r"\.save\(\)") as caught:
        block.run(model=model)
    lines = [number for frame, number in traceback.walk_tb(caught.tb) if frame.f_code.co_filename == block.file]
    assert linecache.getline(block.file, lines[-1]).startswith("print(hidden)")
    right = "\n\n".join(block.parts[2:])
    names = block.run(right, model=model)
    hidden = block.twin(GPT2).run("Hello")[layer(5)]
    same(names["hidden"], hidden)
    assert block.printed.strip() == str(hidden)


@block("common-issues-solutions/issue-remote-timeout")
def patience(block: Block) -> None:
    body = "    hidden = model.transformer.h[5].output[0].save()\n"
    names = block.run(block.text + body, model=block.open(GPT2))
    assert names["tracer"]._owner.options.timeout == 300
    same(names["hidden"], block.twin(GPT2).run("prompt")[layer(5)])


@block("common-issues-solutions/issue-memory-with-many-saved-activations")
def many_saves(block: Block) -> None:
    block.run(model=block.open(DEEP))
    with pytest.raises(UnknownModule, match=r"12 modules; there is no \[12\]"):
        block.run(model=block.open(GPT2))


@block("common-issues-solutions/issue-vllm-gradient-limitation")
def gradients_are_there(block: Block) -> None:
    model = block.run(LanguageModel=LanguageModel)["model"]
    with model.trace("Hello", remote=block.remote):
        hidden = model.transformer.h[5].output[0]
        with model.output[0, -1].max().backward():
            grad = hidden.grad.save()
    alive(grad)


here = pytest.mark.skipif(not REFERENCE.exists(), reason="the text isn't part of this repository")


@here
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_block(name: str, place: Served | None, homes: dict[str, Path]) -> None:
    CASES[name](Block(name, found()[name], homes, place is not None, place.key if place else ""))


@here
def test_every_block_is_tried() -> None:
    assert set(found()) == CASES.keys() | NOT_OURS.keys()
