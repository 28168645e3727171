"""The verbs `gateway` and `worker`: one process alone, over a Redis and a blob store that others share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from interpose_server.datadir import DataDir, default_dir
from interpose_server.settings import Settings
from interpose_server.wanted import Served, with_adapters

from ..errors import ConfigError


def gateway(
    host: str, port: int, tls_cert: Path | None, tls_key: Path | None, data_dir: Path | None, redis_url: str | None
) -> None:
    import uvloop
    from interpose_server import gateway, logs

    if tls_key and not tls_cert:
        raise ConfigError("a key needs its certificate: --tls-cert")
    logs.setup("gateway")
    tls = gateway.Tls(tls_cert, tls_key) if tls_cert else None
    uvloop.run(gateway.alone(_settings(data_dir, redis_url), host, port, tls))


def worker(
    model: str,
    device: str | None,
    dtype: str | None,
    adapters: Sequence[str],
    data_dir: Path | None,
    redis_url: str | None,
) -> None:
    (served,) = with_adapters([Served.parse(model)], adapters)
    settings = _settings(data_dir, redis_url)
    # Before torch is imported: threads that spin while they wait for one another stall on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from interpose_server.models.spec import ModelSpec
    from interpose_server.worker import main

    spec = ModelSpec(
        name=served.name,
        source=served.source,
        dtype=dtype or "auto",
        adapters=dict(served.adapters),
        load_s=main.PATIENCE_S,
    )
    main.run(spec, main.own_name(), settings, device)


def _settings(data_dir: Path | None, redis_url: str | None) -> Settings:
    """The environment's, with what the command line says."""
    settings = Settings.read()
    folder = DataDir(data_dir or default_dir()).path if settings.blobs == "file" else settings.data_dir
    return settings.model_copy(update={"data_dir": folder, "redis_url": redis_url or settings.redis_url})
