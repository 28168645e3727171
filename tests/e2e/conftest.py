"""One real server for the session, which must answer rightly after every test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import next_token_logits
from interpose import LanguageModel
from lora import lora
from models import tiny
from serving import Served, serve

LIMITS = {"nodes": 2_000, "tokens": 8_192, "result_bytes": 100 << 20, "payload_bytes": 4 << 20}
"""Low enough that going ten times over them takes a test no time."""

ENV = {"INTERPOSE_SERVER_LIMITS": json.dumps(LIMITS)}


@pytest.fixture(scope="session")
def sources() -> dict[str, Path]:
    return {
        "tiny-gpt2": tiny("gpt2"),
        "tiny-llama": tiny("llama"),
        "tiny-llama-bf16": tiny("llama", dtype="bfloat16"),
    }


@pytest.fixture(scope="session")
def lab(sources: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = [f"{name}={folder}" for name, folder in sources.items()]
    adapters = {"first": lora("llama"), "second": lora("llama", 1)}
    options = [word for name, at in adapters.items() for word in ("--adapter", f"tiny-llama:{name}={at}")]
    with serve(*served, data_dir=tmp_path_factory.mktemp("lab"), env=ENV, options=tuple(options)) as server:
        yield server


@pytest.fixture
def open_model(lab: Served) -> Callable[..., LanguageModel]:
    def opened(name: str = "tiny-gpt2") -> LanguageModel:
        return LanguageModel(name, host=lab.host, api_key=lab.key)

    return opened


@pytest.fixture(autouse=True)
def serves_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to the shared server, it answers the next job, and rightly."""
    yield
    if "lab" in request.fixturenames:
        server: Served = request.getfixturevalue("lab")
        logits = next_token_logits(server)
        known = _FIRST.setdefault(server.host, logits)
        assert np.array_equal(logits, known)


_FIRST: dict[str, Any] = {}
