from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from interpose.config import CONFIG
from scripted_lab import KEY, Lab, serving


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Lab]:
    monkeypatch.setenv("INTERPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("INTERPOSE_CONFIG", str(tmp_path / "none.toml"))
    (tmp_path / "none.toml").touch()
    with serving(Lab()) as lab:
        CONFIG.HOST, CONFIG.API_KEY, CONFIG.PROGRESS = lab.url, KEY, False
        yield lab
    CONFIG.reset()
