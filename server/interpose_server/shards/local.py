"""A Ray cluster of this machine's own, gone with the process that started it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TOKEN = "ray-token"
"""The file in the data folder that holds the cluster's token."""

OBJECT_BYTES = 1 << 30
"""Of the node's object store. Jobs and results don't go through it."""


def prepare(folder: Path, *, own: bool) -> None:
    """Set what Ray reads from the environment when it is first imported; what the operator has set stays.

    Whoever reaches a Ray cluster runs what they like on it, so that it lets nobody in without a token: this one's
    own, which only its owner can read. No usage statistics are sent.

    Args:
        own: whether the cluster is one of this machine that is started for the folder. How others let people in is
            for them to say.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if own:
        # By default Ray's processes stand behind all others of a machine: on a busy one, jobs lost their leases.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # One that hangs won't finish anything, however long Serve waits for it.
        os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")
    if (
        not own
        or "RAY_AUTH_MODE" in os.environ
        or "RAY_AUTH_TOKEN" in os.environ
        or "RAY_AUTH_TOKEN_PATH" in os.environ
    ):
        return
    path = folder / TOKEN
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
