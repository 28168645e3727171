"""One suite, two ways to run: in this process, and on a real server through its own client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from models import tiny
from serving import Served, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

ATTENTION = "sdpa"


@pytest.fixture(scope="session")
def folders(smollm2: Path) -> dict[str, Path]:
    return {"tiny-gpt2": tiny("gpt2"), "tiny-llama": tiny("llama"), "SmolLM2-135M-Instruct": smollm2}


@pytest.fixture(scope="session")
def served(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real server: gateway, broker and a worker process for each model."""
    sources = [f"{name}={folder}" for name, folder in folders.items()]
    with serve(*sources, data_dir=tmp_path_factory.mktemp("served")) as server:
        yield server


@dataclass(frozen=True)
class Place:
    """Where a test's traces run."""

    open: Callable[[str], LanguageModel]
    options: dict[str, Any]


@cache
def _local(folder: Path) -> LanguageModel:
    return LanguageModel(str(folder))


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Place:
    if request.param == "local":
        return Place(lambda name: _local(folders[name]), {})
    server: Served = request.getfixturevalue("served")
    return Place(lambda name: LanguageModel(name, host=server.host, api_key=server.key), {"remote": True})


@dataclass(frozen=True)
class Stock:
    """The same model as the transformers library loads it, for twins written by hand."""

    model: Any
    tokenizer: Any

    def inputs(self, *prompts: str) -> dict[str, torch.Tensor]:
        """What the library's tokenizer gives, left-padded, with positions where there is padding."""
        rows = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        given = {"input_ids": ids, "attention_mask": mask}
        if not mask.all():
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return given


@pytest.fixture(scope="session")
def stock(folders: dict[str, Path]) -> Callable[..., Stock]:
    @cache
    def load(name: str, attention: str = ATTENTION) -> Stock:
        folder = folders[name]
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
        return Stock(model, AutoTokenizer.from_pretrained(folder))

    return load
