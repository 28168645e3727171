"""What an operator can set: one class, read once by each process from `INTERPOSE_SERVER_*`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from interpose.errors import ConfigError
from interpose.graph.limits import Limits
from interpose.wire.protocol import CHUNK_BYTES, PROTOCOL
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from .mistakes import Mistake, mistakes, nearest, suggestion

PREFIX = "INTERPOSE_SERVER_"
_BASE = Limits()
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")

OF_WORKERS = frozenset(
    ("limits", "batch_jobs", "batch_rows", "batch_tokens", "batch_memory_bytes", "batch_s", "aside_s", "measure_s")
) | {"worker_threads", "grace_s", "finish_s", "shelf_bytes", "backlog_bytes"}
"""Those that may differ from model to model."""


GATEWAYS = frozenset(
    {
        *("metrics_open", "rate_per_s", "rate_burst", "queued_per_user", "queued_total", "streams_per_user"),
        *("downloads_per_user", "subscriptions", "position_s", "drain_s", "sweep_s", "valkey_fsync"),
    }
)
"""Settings that say nothing to workers."""

LIFECYCLE = frozenset(("hold_s", "patience_s", "scale_jobs", "scale_wait_s", "wish_s"))
"""Settings that say how many copies there are, and nothing to them."""


class Settings(BaseSettings):
    """Attributes end with their unit; `INTERPOSE_SERVER_LIMITS='{"wall_s": 60}'` sets limits one by one.

    Attributes:
        redis_url: redis://, rediss:// or unix://; it may hold a password.
        data_dir: blobs, and in embedded mode the broker's files, locks and logs.
        valkey_fsync: of the embedded Valkey: "always" has each accepted job on the disk before it is answered, for
            a few waits for the disk a job; "everysec" may lose the last second's when the machine dies, or when
            Valkey is killed while the disk is slow. Left out, `deploy up` takes the first and `serve` the second.
        blobs: where uploads and results are: "file" for the data folder, or s3://BUCKET/PREFIX, for which the
            usual AWS_* variables say where that is and who asks.
        blob_bytes: of all of them together.
        limits: of one job; the manifest tells clients.
        queued_per_user, running_per_user: jobs of one user, over all models.
        queued_total: jobs waiting on this server.
        rate_per_s, rate_burst: requests of one user to one gateway process.
        result_ttl_s: how long an ended job and its result can be fetched.
        acked_ttl_s: the same, once the client said that it has everything; large results go at once.
        queue_ttl_s: how long a job may wait, and stored attachments live.
        lease_s: a worker silent for so long has lost its jobs.
        max_attempts: a job whose worker died so many times isn't tried again.
        batch_jobs, batch_rows: of one batch.
        batch_tokens: of one shared forward, rows times the longest row; left out, it is measured at load.
        batch_memory_bytes: what a batch may take; left out, a part of what is free at load.
        batch_s: no forward that jobs share is planned to take longer.
        aside_s: a small job waits no longer than this for a big one that is under way, and one of its forwards.
        measure_s: how long a model's forwards are timed at load; 0 times none.
        shelf_bytes: what a worker keeps of attachments, for the next jobs of the users whose they are.
        backlog_bytes: what a worker holds of saves not yet published before its engine waits.
        inline_bytes: saves and payloads up to this size go through the broker, larger ones through the blob store.
        grace_s: how long a running batch may take to finish when the server stops.
        finish_s: a copy that is replaced by another version of its model runs what was recorded against its own for
            so long at most.
        drain_s: how long a gateway that is to stop still takes requests, while /readyz tells load balancers of it.
        streams_per_user, downloads_per_user: open at once on one gateway process.
        load_retry_s: a model that couldn't be loaded is left alone for so long, unless somebody asks.
        wish_s: a model that was asked for, but by no job, is loaded if there is room within so long.
        hold_s: a model that was loaded stays for at least so long before another may have its place.
        patience_s: for a model that had no copy for so long, though somebody waits for it, one that has work makes
            way, too, once it has had its turn.
        scale_jobs, scale_wait_s: another copy of a model is loaded where more jobs than this wait for each it has,
            or one for longer.
        metrics_open: whether /metrics answers without an admin's key.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", allow_inf_nan=False)

    redis_url: str = Field(default="redis://127.0.0.1:6379/0", repr=False)
    data_dir: Path = Path("interpose-data")
    valkey_fsync: Literal["always", "everysec"] | None = None
    blobs: str = "file"
    limits: Limits = Field(default_factory=Limits)
    protocols: tuple[int, ...] = (PROTOCOL,)

    queued_per_user: int = Field(default=1000, ge=1)
    running_per_user: int = Field(default=256, ge=1)
    queued_total: int = Field(default=20_000, ge=1)
    rate_per_s: float = Field(default=1000.0, gt=0)
    rate_burst: float = Field(default=2000.0, ge=1)

    result_ttl_s: float = Field(default=3600.0, gt=0)
    acked_ttl_s: float = Field(default=60.0, gt=0)
    queue_ttl_s: float = Field(default=86_400.0, gt=0)
    sweep_s: float = Field(default=5.0, gt=0)
    blob_bytes: int = Field(default=20 << 30, gt=0)

    lease_s: float = Field(default=15.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    batch_jobs: int = Field(default=64, ge=1)
    batch_rows: int = Field(default=256, ge=1)
    batch_tokens: int | None = Field(default=None, ge=1)
    batch_memory_bytes: int | None = Field(default=None, gt=0)
    batch_s: float = Field(default=2.0, gt=0)
    aside_s: float = Field(default=1.0, ge=0)
    measure_s: float = Field(default=2.0, ge=0, le=60)
    worker_threads: int | None = Field(default=None, ge=1)
    grace_s: float = Field(default=20.0, ge=0)
    finish_s: float = Field(default=300.0, ge=0)
    drain_s: float = Field(default=0.0, ge=0)

    load_retry_s: float = Field(default=300.0, gt=0)
    wish_s: float = Field(default=120.0, gt=0)
    hold_s: float = Field(default=60.0, ge=0)
    patience_s: float = Field(default=300.0, ge=0)
    scale_jobs: int = Field(default=64, ge=1)
    scale_wait_s: float = Field(default=10.0, gt=0)

    shelf_bytes: int = Field(default=512 << 20, ge=0)
    backlog_bytes: int = Field(default=256 << 20, ge=0)
    inline_bytes: int = Field(default=32 << 10, ge=0)
    chunk_bytes: int = Field(default=CHUNK_BYTES, ge=1, le=16 << 20)
    streams_per_user: int = Field(default=64, ge=1)
    downloads_per_user: int = Field(default=64, ge=1)
    subscriptions: int = Field(default=4096, ge=1)
    position_s: float = Field(default=1.0, gt=0)
    metrics_open: bool = False

    @field_validator("limits", mode="before")
    @classmethod
    def _limits(cls, value: Any) -> Any:
        """Named limits over the defaults; a name that doesn't exist is refused."""
        if isinstance(value, dict) and (wrong := sorted(value.keys() - _BASE.as_dict().keys())):
            raise ValueError(f"there is no limit {wrong[0]!r}{suggestion(str(wrong[0]), _BASE.as_dict())}")
        if not isinstance(value, dict):
            return value
        for name, limit in value.items():
            if type(limit) not in (int, float) or not 0 <= limit < math.inf:
                raise ValueError(f"the limit {name} is a number, not below zero and not endless")
        return Limits(**{**_BASE.as_dict(), **value})

    @field_validator("blobs")
    @classmethod
    def _blobs(cls, value: str) -> str:
        parts = urlsplit(value)
        if value != "file" and (parts.scheme != "s3" or not _BUCKET.fullmatch(parts.netloc) or parts.query):
            # Not quoted: somebody may have written a key into it.
            raise ValueError('neither "file" nor s3://BUCKET/PREFIX; keys belong in AWS_ACCESS_KEY_ID and the like')
        return value

    @classmethod
    def read(cls) -> Settings:
        """The environment's. Raises ConfigError, which names the variable at fault, also one that is no setting."""
        names = [PREFIX + name.upper() for name in cls.model_fields]
        for name in sorted(os.environ):
            if name.upper().startswith(PREFIX) and name.upper() not in names:
                close = nearest(name.upper().removeprefix(PREFIX), cls.model_fields)
                advice = f"; did you mean {PREFIX}{close.upper()}?" if close else ""
                raise ConfigError(f"there is no setting {name}{advice}")
        try:
            return cls()
        except ValidationError as error:
            wrong = mistakes(error.errors(), cls)[0]
            name = "_".join(map(str, wrong.place)).upper()
            raise ConfigError(f"{PREFIX}{name}: {wrong.told}") from error
        except SettingsError as error:
            raise ConfigError(_unreadable(cls)) from error

    def mistakes_in(self, changes: Mapping[str, Any], *, only: Collection[str] = OF_WORKERS) -> list[Mistake]:
        """What is wrong with changes of these settings; by default those of one model."""
        wrong = []
        for name in changes:
            if name in only:
                continue
            told = f"there is no such setting{suggestion(name, sorted(only))}"
            if name in type(self).model_fields:
                told = f"can't differ from model to model; these can: {', '.join(sorted(only))}"
            wrong.append(Mistake((name,), told, at_key=True))
        if not wrong and changes:
            try:
                self._with(changes)
            except ValidationError as error:
                return mistakes(error.errors(), type(self))
        return wrong

    def changed(self, changes: Mapping[str, Any], *, only: Collection[str] = OF_WORKERS) -> Settings:
        """These settings, some of them with other values; by default those of one model. Raises ConfigError."""
        if wrong := self.mistakes_in(changes, only=only):
            raise ConfigError(f"setting {wrong[0]}")
        return self._with(changes) if changes else self

    def _with(self, changes: Mapping[str, Any]) -> Settings:
        limits = changes.get("limits")
        if isinstance(limits, Mapping):
            changes = {**changes, "limits": {**self.limits.as_dict(), **limits}}
        return Settings(**{**self.model_dump(), **changes})

    @property
    def silent_ms(self) -> int:
        """A copy of a model that was silent for longer counts as gone."""
        return int(max(self.lease_s, 5.0) * 1000)

    @cached_property
    def blob_dir(self) -> Path:
        return self.data_dir / "blobs"

    def environment(self) -> dict[str, str]:
        """The variables that make a child process read these same settings."""
        plain = self.model_dump(mode="json", exclude_none=True)
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in plain.items()}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        return {**kept, **{PREFIX + name.upper(): value for name, value in texts.items()}}


def _unreadable(kind: type[Settings]) -> str:
    """Which of the variables that hold JSON holds none."""
    for name, field in kind.model_fields.items():
        text = os.environ.get(PREFIX + name.upper())
        if text is None or field.annotation not in (Limits, tuple[int, ...]):
            continue
        try:
            json.loads(text)
        except ValueError as error:
            shown = '{"wall_s": 60}' if name == "limits" else "[1]"
            return f"{PREFIX}{name.upper()} has to be JSON, such as {shown}: {error}"
    return f"a setting {PREFIX}... can't be read"
