"""Every key of the broker's Redis, and the same names for its Lua scripts.

A *ref* is "user/job id": users never share a job, so a ref is all that is needed to find one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from interpose.errors import InvalidPayload
from interpose.wire.status import TRANSITIONS

from .states import TRANSITIONS as MODEL_TRANSITIONS

JOB = "ip:job:{ref}"
"""Hash: everything known of one job."""
EVENTS = "ip:events:{ref}"
"""Stream: the job's events, with ids `<seq>-0`, seq from 1."""
BLOBS = "ip:blobs:{ref}"
"""List: names of the blobs with its results."""
QUEUE = "ip:queue:{model}/{user}"
"""Sorted set of refs: one user's waiting jobs for one model, first one lowest."""
USERS = "ip:users:{model}"
"""Sorted set of users with waiting jobs, by virtual time."""
CLOCK = "ip:clock:{model}"
"""Hash: user -> virtual time in seconds; "/now" -> that of the last job served;
"/depth", "/running" -> jobs waiting, leased; "/used" -> when one last came, or ended, in ms."""
TALLY = "ip:tally:{model}"
"""Hash: how many jobs came to each status, since ever; those requeued; "wait_ms", how long they waited in all."""
BELL = "ip:bell:{model}"
"""List that a worker without work blocks on."""
QUEUED = "ip:queued:{user}"
RUNNING = "ip:running:{user}"
"""Sets of refs."""
JOBS = "ip:jobs:{user}"
"""Sorted set of ids by creation."""
USAGE = "ip:usage:{user}"
"""Hash: jobs, seconds, bytes."""
LEASES = "ip:leases"
"""Sorted set of refs by the time their worker's lease ends, in ms."""
EXPIRY = "ip:expiry"
"""Sorted set of refs by the time they are to be looked at by the sweep, in ms."""
ORDER = "ip:order"
"""Counter: order of submission."""
TOTAL = "ip:total"
"""Counter: jobs waiting on the whole server."""
MODELS = "ip:models"
"""Set of model names."""
MODEL = "ip:model:{model}"
"""Hash: what a worker published of its model; why it couldn't be loaded; when somebody last wished for it."""
STATES = "ip:states:{model}"
"""Hash: worker -> state of the copy it holds."""
HEARD = "ip:heard:{model}"
"""Sorted set of those workers by when they were last heard of, in ms."""
SERVED = "ip:served:{model}"
"""Hash: worker -> what its copy serves: revision of the model and of its adapters."""
SPECS = "ip:specs"
"""Hash: name -> JSON of the catalogue's entry."""
SPECS_CHANGED = "ip:specs-changed"
"""Counter: changes of the catalogue."""
RETIRED = "ip:retired"
"""Set of the models that were forgotten and haven't come back: a gateway may still think that they are served."""
KEEPER = "ip:keeper"
"""There while somebody brings models up and down as the catalogue says."""
INVENTORY = "ip:inventory"
"""String that expires: JSON of the cluster's devices, and what holds them."""
KEYS = "ip:keys"
"""Hash: SHA-256 of a token -> its record."""
KEY_IDS = "ip:key-ids"
"""Hash: a key's id -> SHA-256 of its token."""
PUSHED = 16 << 10
"""Bytes of events up to which they go along with the wake-up."""
WAKE = "ip:wake"
"""Channel: a ref whose events grew, perhaps with them (see `wake` in common.lua), or "!id" for a revoked key."""
STORE = "ip:store"
"""String: names this broker's part of a bucket."""
STORED = "ip:stored"
"""Hash: a blob's name -> "bytes object". The blobs there are, where their bytes are in a bucket."""
STORED_ENDS = "ip:stored-ends"
"""Sorted set of blobs' names by the time they may be deleted, in ms."""
STORED_BYTES = "ip:stored-bytes"
"""Counter: bytes charged for all of them, and for those being written."""
WRITING = "ip:writing"
"""Hash: an object being written -> bytes charged for it."""
TRASH = "ip:trash"
"""Sorted set of objects no blob is in, or not yet, by the time they are to be deleted, in ms."""
TIDIED = "ip:tidied"
"""String that expires: the bucket was compared with all this a while ago."""

_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,3}")


def check_user(name: str) -> str:
    """`name` if it can be a user's. Raises InvalidPayload otherwise."""
    if not _USER.fullmatch(name):
        raise InvalidPayload("a user's name is up to 64 letters, digits, dots, dashes, underscores or @")
    return name


def check_model(name: str) -> str:
    """`name` if it can be a model's. Raises InvalidPayload otherwise."""
    if len(name) > 200 or not _MODEL.fullmatch(name):
        raise InvalidPayload("a model's name is letters, digits, dots, dashes, underscores and slashes between")
    return name


def ref(user: str, job: str) -> str:
    return f"{user}/{job}"


def split(ref: str) -> tuple[str, str]:
    """User and job id."""
    user, _, job = ref.partition("/")
    return user, job


_FORMATS = {
    "JOB": JOB, "EVENTS": EVENTS, "BLOBS": BLOBS, "QUEUE": QUEUE, "USERS": USERS, "CLOCK": CLOCK, "BELL": BELL,
    "QUEUED": QUEUED, "RUNNING": RUNNING, "JOBS": JOBS, "USAGE": USAGE, "LEASES": LEASES, "EXPIRY": EXPIRY,
    "ORDER": ORDER, "TOTAL": TOTAL, "WAKE": WAKE, "ACCOUNTS": KEYS, "MODELS": MODELS, "MODEL": MODEL,
    "STATES": STATES, "HEARD": HEARD, "SERVED": SERVED,
    "SPECS": SPECS, "SPECS_CHANGED": SPECS_CHANGED, "RETIRED": RETIRED,
    "STORED": STORED, "STORED_ENDS": STORED_ENDS, "STORED_BYTES": STORED_BYTES, "WRITING": WRITING,
    "TRASH": TRASH, "TALLY": TALLY,
}  # fmt: skip


def prelude() -> str:
    """Lua: each key's name as a string or a function of its parts, and the transitions of a job and a model."""
    lines = []
    for name, pattern in _FORMATS.items():
        parts = re.findall(r"\{(\w+)\}", pattern)
        if parts:
            body = re.sub(r"\{(\w+)\}", r"'..\1..'", pattern)
            lines.append(f"local function {name}({', '.join(parts)}) return '{body}' end")
        else:
            lines.append(f"local {name} = '{pattern}'")
    lines.append(f"local PUSHED = {PUSHED}")
    return "\n".join([*lines, _ways("WAYS", TRANSITIONS), _ways("MODEL_WAYS", MODEL_TRANSITIONS)])


def _ways(name: str, transitions: Mapping[Any, frozenset[Any]]) -> str:
    ways = ", ".join(
        f"{old} = {{{', '.join(f'{new} = true' for new in sorted(news))}}}" for old, news in transitions.items()
    )
    return f"local {name} = {{{ways}}}"
