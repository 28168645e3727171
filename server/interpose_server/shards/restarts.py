"""What `deploy up` decides once, when it starts a cluster: a file that says otherwise later changes none of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..models.spec import ClusterConfig
from ..settings import LIFECYCLE, OF_WORKERS, Settings

OF_THE_FILE = ("ray", "redis_url", "host", "port", "gateway")
SECRET = ("redis_url",)
"""May hold a password."""

LIVE = OF_WORKERS - {"limits"} | LIFECYCLE - {"wish_s"} | {"redis_url", "data_dir", "metrics_open"}
"""Settings that say nothing to a gateway, or that aren't the file's. What runs on Ray takes all others at once."""


def decided(config: ClusterConfig, settings: Settings) -> str:
    """For the note that a starting cluster leaves on its data folder."""
    file = config.model_dump(mode="json", include=set(OF_THE_FILE))
    return json.dumps({"file": file, "settings": settings.model_dump(mode="json", exclude=set(LIVE))})


def ignored(noted: str, config: ClusterConfig, settings: Settings) -> list[str]:
    """What a file says by now that the running cluster doesn't do, a line each.

    Args:
        noted: by `decided`.
    """
    before, now = json.loads(noted), json.loads(decided(config, settings))
    found = [*_changed(before["file"], now["file"], "the cluster")]
    if config.gateway is not False:
        found += _changed(before["settings"], now["settings"], "what runs here", "settings.")
    return found


def unused(config: ClusterConfig) -> list[str]:
    """What a file says of a gateway that it starts none of."""
    said = [name for name in ("host", "port") if name in config.model_fields_set]
    return [f"{name} says nothing here: no gateway is started (`gateway: true` would)" for name in said]


def _changed(before: dict[str, Any], now: dict[str, Any], who: str, prefix: str = "") -> Iterator[str]:
    for name, value in now.items():
        if name not in before or before[name] == value:
            continue
        if name == "limits":
            yield from _changed(before[name], value, who, f"{prefix}limits.")
        elif name in SECRET:
            yield f"{prefix}{name} is another now, which {who} takes when it is started again"
        else:
            kept = "none" if before[name] is None else before[name]
            yield f"{prefix}{name} is {_said(value)} now; {who} keeps {_said(kept)} until it is started again"


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
