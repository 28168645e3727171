"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from interpose_server.broker.connect import Broker, connect
from interpose_server.settings import Settings
from rig import Valkey, make_settings, run_valkey


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    yield from run_valkey()


@pytest.fixture
def valkey(shared_valkey: Valkey) -> Valkey:
    shared_valkey.clear()
    return shared_valkey


@pytest.fixture
def settings(valkey: Valkey, tmp_path: Path) -> Settings:
    return make_settings(valkey, tmp_path)


@pytest.fixture
async def broker(settings: Settings) -> AsyncIterator[Broker]:
    broker = connect(settings)
    yield broker
    await broker.close()
