"""Jobs with adapters beside jobs with others or none: each has its own numbers, and nothing stays switched."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from interpose.errors import ConfigError, InterposeError, ModelUpdated, OutOfMemory, UnknownAdapter
from interpose.graph.adapters import check_revision, revision_of
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.runtime import adapters, products
from interpose.runtime.adapter_files import CONFIG, WEIGHTS
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import load, with_adapters
from interpose.runtime.lora import load as load_lora
from interpose.runtime.prepared import Preparation
from interpose.runtime.split.sites import Split
from lora import lora, reconfigured, stock
from models import tiny
from recording import Kept
from transformers import ViTConfig, ViTForImageClassification

SOURCES = {"a": lora("llama", targets=["q_proj", "o_proj", "lm_head"]), "b": lora("llama", 1)}
NAMES = (None, "a", "b")
BLOCK, HEAD, OUT = "model.layers.1", "lm_head", "model.layers.0.self_attn.o_proj"


@cache
def engine() -> Engine:
    return Engine(load(tiny("llama"), adapters=SOURCES))


@cache
def logits(name: str | None, row: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = stock("llama", name and SOURCES[name])(torch.tensor([row])).logits
    return found


def forward(name: str | None, row: Sequence[int] = (5, 9, 33), *more: Node) -> EngineJob:
    """Saves the logits, and what a module makes of a value."""
    nodes = (
        Node(0, "read", point=Point(BLOCK, "output"), invoke=0),
        Node(1, "call", (OUT, Ref(0)), invoke=0),
        Node(2, "read", point=Point("", "output", ("logits",)), invoke=0),
        Node(3, "save", (Ref(2),), invoke=0),
        Node(4, "save", (Ref(1),), invoke=0),
        *more,
    )
    return EngineJob(Graph((Run("trace", (Invoke((tuple(row),)),), adapter=name),), nodes), {}, Kept())


def generation(name: str | None, new: int, row: Sequence[int] = (5, 9, 33)) -> EngineJob:
    nodes = (Node(0, "tokens"), Node(1, "save", (Ref(0),)))
    run = Run("generate", (Invoke((tuple(row),)),), {"max_new_tokens": new, "do_sample": False}, name)
    return EngineJob(Graph((run,), nodes), {}, Kept())


@cache
def generated(name: str | None, new: int, row: tuple[int, ...] = (5, 9, 33)) -> list[int]:
    job = generation(name, new, row)
    assert engine().run([job]) == [None]
    found: list[int] = job.sink.values[1].tolist()[0]
    return found


@pytest.fixture(autouse=True)
def nothing_stays_chosen() -> Any:
    yield
    assert adapters._CHOSEN.get() is None


def test_at_once_each_has_its_own_numbers() -> None:
    rows = [(5, 9, 33), (81, 2, 14, 7, 60), (4, 4)]
    jobs = [(name, row, forward(name, row)) for row in rows for name in NAMES]
    assert engine().run([job for *_, job in jobs]) == [None] * len(jobs)
    for name, row, job in jobs:
        torch.testing.assert_close(job.sink.values[3], logits(name, row), rtol=0, atol=1e-4)
        single = forward(name, row)
        engine().run([single])
        torch.testing.assert_close(job.sink.values[4], single.sink.values[4], rtol=0, atol=1e-4)
    apart = [job.sink.values[4] for _, row, job in jobs if row == rows[0]]
    assert all(float((one - other).abs().max()) > 1e-2 for one, other in pairwise(apart))


def test_forwards_are_shared_by_one_adapter_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [[forward(name) for name in (*NAMES, *NAMES)] for _ in range(2)]
    engine().run(jobs[0])  # what the model can do is tried at its first jobs
    groups: list[list[str | None]] = []
    stock_forward = Engine._feed

    def feed(self: Engine, group: Any, pace: Any) -> None:
        groups.append([job.plan.graph.runs[run].adapter for job, run in group])
        stock_forward(self, group, pace)

    monkeypatch.setattr(Engine, "_feed", feed)
    assert engine().run(jobs[1]) == [None] * 6
    assert not caplog.records
    assert sorted(groups, key=str) == sorted([[name, name] for name in NAMES], key=str)


def test_runs_of_one_job_share_nothing_made_with_other_adapters(eager_cuts: None) -> None:
    """The same prompt, which by itself would be run once, with later runs begun in the middle or behind it."""
    nodes: list[Node] = []
    for run in range(6):
        at = len(nodes)
        nodes += [
            Node(at, "read", point=Point("model.layers.2", "output"), invoke=0, run=run),
            Node(at + 1, "mul", (Ref(at), 1.0 + run // 3), invoke=0, run=run),
            Node(
                at + 2, "write", ((), None, Ref(at + 1)), point=Point("model.layers.2", "output"), invoke=0, run=run
            ),
            Node(at + 3, "read", point=Point("", "output", ("logits",)), invoke=0, run=run),
            Node(at + 4, "save", (Ref(at + 3),), invoke=0, run=run),
        ]
    row = Invoke((tuple(range(3, 60)),))
    runs = tuple(Run("trace", (row,), adapter=NAMES[run % 3]) for run in range(6))
    job = EngineJob(Graph(runs, tuple(nodes)), {}, Kept())
    assert engine().run([job]) == [None]
    for run in range(3):
        found = job.sink.values[5 * run + 4]
        torch.testing.assert_close(found, logits(NAMES[run], row.rows[0]), rtol=0, atol=2e-4)


def test_what_is_called_in_one_run_and_computed_in_anothers_forward_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several jobs' calls never become one product where an adapter may stand before the layer."""
    monkeypatch.setattr(products, "LARGE_BYTES", 0)
    row = Invoke(((5, 9, 33),))
    nodes = (
        Node(0, "read", point=Point(BLOCK, "output"), invoke=0),
        Node(1, "read", point=Point("", "output", ("logits",)), invoke=0),
        Node(2, "save", (Ref(1),), invoke=0),
        Node(3, "call", (HEAD, Ref(0)), invoke=0, run=1),
        Node(4, "save", (Ref(3),), invoke=0, run=1),
        Node(5, "call", (HEAD, Ref(0)), invoke=0),
        Node(6, "save", (Ref(5),), invoke=0),
    )

    def job(first: str | None, second: str | None, *, alone: bool) -> EngineJob:
        runs = (Run("trace", (row,), adapter=first), Run("trace", (row,), adapter=second))
        return EngineJob(Graph(runs, nodes), {}, Kept(), exclusive=alone)

    for names in (("a", None), ("a", "b"), (None, "a")):
        alone, *shared = job(*names, alone=True), job(*names, alone=False), job(*names, alone=False)
        assert engine().run([alone]) == [None]
        assert engine().run(shared) == [None, None]
        assert float((alone.sink.values[4] - alone.sink.values[6]).abs().max()) > 1e-2
        for one in shared:
            for node in (2, 4, 6):
                torch.testing.assert_close(one.sink.values[node], alone.sink.values[node], rtol=0, atol=1e-4)


def test_what_a_graph_was_prepared_for_is_kept_by_adapter() -> None:
    prepare = Preparation(engine().manifest)
    reports = [prepare(job.graph, {}, job.limits, "me", None).report for job in map(forward, NAMES)]
    assert [report.footprint.adapters for report in reports] == [("",), ("a",), ("b",)]
    with pytest.raises(UnknownAdapter, match="it has a, b"):
        prepare(forward("c").graph, {}, forward("c").limits, "me", None)


class Company:
    """Jobs that come to a generation at given steps, to join it or aside."""

    def __init__(self, joining: dict[int, list[EngineJob]], aside: dict[int, list[EngineJob]]) -> None:
        self.joining, self.aside, self.step = joining, aside, 0
        self.ends: list[tuple[EngineJob, InterposeError | None]] = []

    def due(self) -> bool:
        return self.step + 1 in self.aside

    def pause(self, *, joinable: bool) -> None:
        self.step += 1
        for job in self.aside.pop(self.step, ()):
            self.ends.append((job, *engine().run([job])))

    def arrivals(self) -> Sequence[EngineJob]:
        return self.joining.pop(self.step, [])

    def ended(self, job: EngineJob, error: InterposeError | None) -> None:
        self.ends.append((job, error))


@pytest.mark.parametrize("host", NAMES)
def test_generations_are_joined_by_their_own_and_pass_by_others(host: str | None) -> None:
    begun = [generation(host, 12), generation(host, 9, (7, 7))]
    joins = [generation(host, 5, (81, 2, 14)), *(generation(name, 4) for name in NAMES if name != host)]
    aside = [forward(name) for name in NAMES] + [generation(name, 3) for name in NAMES]
    company = Company({3: joins}, {2: aside[:3], 4: aside[3:]})
    engine().host(begun, company)
    assert len(company.ends) == len(begun) + len(joins) + len(aside)
    for job, error in company.ends:
        run = job.graph.runs[0]
        assert error is None
        if run.kind == "trace":
            expected = logits(run.adapter, run.invokes[0].rows[0])
            torch.testing.assert_close(job.sink.values[3], expected, rtol=0, atol=1e-4)
        else:
            expected_ids = generated(run.adapter, run.options["max_new_tokens"], run.invokes[0].rows[0])
            assert job.sink.values[1].tolist()[0] == expected_ids


def test_others_begun_with_another_adapter_are_run_after() -> None:
    jobs = [generation(name, 4) for name in NAMES]
    company = Company({}, {})
    engine().host(jobs, company)
    assert {id(job) for job, error in company.ends if error is None} == set(map(id, jobs))
    for job in jobs:
        assert job.sink.values[1].tolist()[0] == generated(job.graph.runs[0].adapter, 4)


@pytest.mark.parametrize("raised", [RuntimeError("broken"), torch.OutOfMemoryError("full")])
def test_a_failure_inside_leaves_nothing_switched(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = engine().loaded.adapters["a"].layers[engine().loaded.modules[OUT]]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", broken)
        jobs = [forward(name) for name in NAMES]
        errors = engine().run(jobs)
    assert [error is None for error in errors] == [True, False, True]
    assert isinstance(errors[1], OutOfMemory) == isinstance(raised, torch.OutOfMemoryError)
    for job, name in zip(jobs, NAMES, strict=True):
        if name != "a":
            torch.testing.assert_close(job.sink.values[3], logits(name, (5, 9, 33)), rtol=0, atol=1e-4)
    again = forward("a")
    assert engine().run([again]) == [None]
    torch.testing.assert_close(again.sink.values[3], logits("a", (5, 9, 33)), rtol=0, atol=1e-4)


# -- loading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "is IA3"),
        ({"peft_type": "NONE_SUCH"}, "can't be read"),
        ({"r": 4}, "doesn't fit"),
        ({"target_modules": ["nowhere"]}, "doesn't fit"),
        ({"target_modules": ["q_proj"]}, "isn't of this model"),
        ({"target_modules": "("}, "doesn't fit"),
        ({"lora_alpha": 10**400}, "doesn't fit"),
    ],
)
def test_what_more_than_single_layers_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    loaded = engine().loaded
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    tree = [name for name, _ in loaded.model.named_modules()]
    with pytest.raises(ConfigError, match=said):
        with_adapters(loaded, {"c": reconfigured("llama", tmp_path / "changed", **settings)})
    assert [name for name, _ in loaded.model.named_modules()] == tree
    assert not any(value.requires_grad for value in loaded.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    again = forward("a")
    assert engine().run([again]) == [None]
    torch.testing.assert_close(again.sink.values[3], logits("a", (5, 9, 33)), rtol=0, atol=1e-4)


def test_experts_that_the_library_fuses_are_refused(tmp_path: Path) -> None:
    """Adapters of a Mixtral name its experts' layers as they were; what is of single layers is taken."""
    loaded = load(tiny("mixtral"), adapters={"a": lora("mixtral")})
    assert loaded.adapters["a"].info.targets == ("o_proj", "q_proj")
    folder = tmp_path / "experts"
    shutil.copytree(lora("mixtral"), folder)
    config = json.loads((folder / CONFIG).read_text())
    config |= {"target_modules": ["q_proj", "o_proj", "w1", "w3"], "target_parameters": None, "lora_dropout": 0.0}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="target_parameters"):
        with_adapters(loaded, {"b": folder})


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    loaded = engine().loaded
    with pytest.raises(ConfigError, match="no folder"):
        with_adapters(loaded, {"c": tmp_path / "nowhere"})
    with pytest.raises(ConfigError, match=f"holds no {CONFIG}"):
        with_adapters(loaded, {"c": tmp_path})
    shutil.copy(lora("llama") / CONFIG, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=f"{WEIGHTS}; its weights are a pickle"):
        with_adapters(loaded, {"c": tmp_path})
    (tmp_path / WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=f"{WEIGHTS} can't be read"):
        with_adapters(loaded, {"c": tmp_path})
    (tmp_path / CONFIG).write_text('{"a":' * 100_000)
    with pytest.raises(ConfigError, match=f"{CONFIG} can't be read"):
        with_adapters(loaded, {"c": tmp_path})
    with pytest.raises(ConfigError, match="named by letters"):
        with_adapters(loaded, {"../c": lora("llama")})


def test_revisions_are_of_what_a_graph_uses() -> None:
    """Jobs that wait outlive whatever is loaded beside what they use."""
    loaded = load(tiny("llama"))
    first, same, other, both = (
        with_adapters(loaded, sources).manifest
        for sources in (
            {"a": lora("llama")},
            {"a": lora("llama")},
            {"a": lora("llama", 1)},
            {"a": lora("llama"), "b": lora("llama", 1)},
        )
    )
    plain, chosen = forward(None).graph.runs, forward("a").graph.runs
    assert {revision_of(plain, manifest) for manifest in (first, other, both)} == {loaded.manifest.revision}
    of_a = revision_of(chosen, first)
    assert of_a == revision_of(chosen, same) == revision_of(chosen, both) != revision_of(chosen, other)
    assert of_a != revision_of(forward("b").graph.runs, both)
    check_revision(of_a, chosen, both)
    with pytest.raises(ModelUpdated, match=r"at revision \w+\+\w+, the graph was recorded against"):
        check_revision(of_a, chosen, other)
    with pytest.raises(UnknownAdapter, match="it has none at all"):
        check_revision(of_a, chosen, loaded.manifest)


def test_models_that_lie_elsewhere_refuse_them() -> None:
    loaded = engine().loaded
    split = replace(loaded, split=Split(None, None))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lies in several processes"):
        with_adapters(split, {"c": lora("llama")})
    assert with_adapters(split, {}) is split
    away = load(tiny("llama"))
    away.model.get_submodule(OUT).to("meta")
    with pytest.raises(ConfigError, match=f"the weights of {OUT} aren't in this process's memory"):
        with_adapters(away, {"c": lora("llama")})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_layers_of_other_kinds(tmp_path: Path) -> None:
    """A convolution, beside linear layers, of a model that reads images."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 80}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=24, patch_size=8, **sizes)).eval()
    config = peft.LoraConfig(r=2, target_modules=["projection", "dense"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 24, 24)
    plain = model(images).logits
    found = load_lora(model, "a", tmp_path)
    assert "projection" in found.info.targets and torch.equal(model(images).logits, plain)
    conv = model.get_submodule("vit.embeddings.patch_embeddings.projection")
    with adapters.chosen({"a": found}, "a"):
        assert torch.equal(model(images).logits, theirs(images).logits)
        weight, bias = adapters.adapted(conv, "weight"), adapters.adapted(conv, "bias")
        made = torch.nn.functional.conv2d(images, weight, conv.bias, stride=8)
        torch.testing.assert_close(conv(images), made, rtol=0, atol=1e-5)
    assert bias is None and adapters.adapted(conv, "weight") is None
