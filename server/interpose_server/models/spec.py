"""What an operator says of a cluster: which models, on how many devices, how many copies, when. A YAML file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from interpose.errors import ConfigError, InvalidPayload
from interpose.graph.adapters import check_name as check_adapter_name
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..broker.keys import check_model
from ..mistakes import Mistake, mistakes, suggestion
from ..settings import Settings
from .document import Document
from .schedule import Window


class Placement(StrEnum):
    """How one copy of a model lies on devices."""

    AUTO = "auto"
    """Whichever of the others its size asks for."""
    DEVICE = "device"
    """One device, or a part of one."""
    DEVICES = "devices"
    """Several devices of one process."""
    BLOCKS = "blocks"
    """Ranges of its blocks, each in a process of its own."""


class Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


P = TypeVar("P", bound=Plain)

LOAD_S = 1800.0
"""Loading a model may take so long where nobody says."""

MOST = 10_000
"""Copies of a model, and processes of a copy."""

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
"""What weights can be loaded as: those of interpose.runtime.sources, which needs torch."""

RAYS_OWN = {"CPU", "GPU", "memory", "object_store_memory"}
"""Resources that Ray takes by other ways only."""


class Replicas(Plain):
    """Copies of a model. With `min` 0 it is loaded when somebody asks for it."""

    min: int = Field(default=0, ge=0)
    max: int = Field(default=1, ge=1, le=MOST)

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"at least {self.min} copies and at most {self.max} can't both be")
        return self


class ModelSpec(Plain):
    """One model of the catalogue.

    Attributes:
        name: under which it is served.
        source: a hub id, or a folder that every node sees.
        revision: the hub's.
        dtype: "float32", "bfloat16", ...; "auto" as saved.
        quantization: a scheme of the transformers library, by name.
        placement, devices, shards: how a copy lies on devices; left out, its size decides. Less than one device is
            a part of one, which other models may share.
        device_memory: bytes of one device, where that can't be asked.
        resources: Ray's custom resources that a copy takes.
        pinned: it is never evicted.
        idle_s: so long without a job, and a copy beyond the least is let go.
        schedule: when it is kept loaded, as "mon-fri 08:00-20:00", in UTC.
        load_s: loading may take so long.
        adapters: name -> source of LoRA weights that jobs may choose.
        settings: of the worker's settings, those that differ for this model.
    """

    name: str
    source: str = ""
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    placement: Placement = Placement.AUTO
    devices: float | None = Field(default=None, ge=0)
    shards: int | None = Field(default=None, ge=1, le=MOST)
    device_memory: int | None = Field(default=None, gt=0, lt=1 << 60)
    resources: Mapping[str, float] = Field(default_factory=dict)
    replicas: Replicas = Replicas()
    pinned: bool = False
    idle_s: float = Field(default=900.0, gt=0)
    schedule: tuple[str, ...] = Field(default=(), max_length=100)
    load_s: float = Field(default=LOAD_S, gt=0)
    adapters: Mapping[str, str] = Field(default_factory=dict)
    settings: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def in_blocks(self) -> bool:
        """Whether it is said that a copy lies in ranges of blocks: several shards say so, too."""
        several = self.placement is Placement.AUTO and (self.shards or 1) > 1
        return several or self.placement is Placement.BLOCKS

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        try:
            return check_model(value)
        except InvalidPayload as error:
            raise ValueError(error.message) from error

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, windows: tuple[str, ...]) -> tuple[str, ...]:
        for text in windows:
            Window.parse(text)
        return windows

    @field_validator("adapters")
    @classmethod
    def _adapters(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        try:
            for name in value:
                check_adapter_name(name)
        except ConfigError as error:
            raise ValueError(error.message) from error
        return value

    @model_validator(mode="after")
    def _sound(self) -> ModelSpec:
        if self.devices is not None and self.devices > 1 and self.devices != int(self.devices):
            raise ValueError("beyond one, devices come whole")
        if self.placement is Placement.DEVICE and (self.devices or 0) > 1:
            raise ValueError("placement: device is one device; for several, leave it out, or say devices or blocks")
        if self.in_blocks and self.shards and (self.devices or 0) > 1 and self.devices != self.shards:
            raise ValueError("a part of a model in blocks takes one device at most; shards says how many parts")
        try:
            json.dumps(self.model_dump(), ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            # What was kept of it would be something else, or couldn't be listed.
            raise ValueError("it holds something that JSON can't say, such as an endless number") from error
        return self

    def wrong(self) -> Iterator[Mistake]:
        """A dtype there is none of, and resources that Ray doesn't take. Asked of what is written, not of what the
        broker has kept."""
        if self.dtype not in DTYPES:
            close = suggestion(self.dtype, DTYPES, listed=False)
            yield Mistake(("dtype",), f"has to be one of {', '.join(DTYPES)}, not {self.dtype[:60]!r}{close}")
        for name, amount in self.resources.items():
            if name in RAYS_OWN:
                told = "is no resource of your own; devices says what a copy takes"
                yield Mistake(("resources", name), told, at_key=True)
            elif amount < 0 or (amount > 1 and amount != int(amount)) or amount != round(amount, 4):
                told = f"has to be a whole number, or a part of one with up to four digits, not {amount:g}"
                yield Mistake(("resources", name), told)

    @classmethod
    def checked(cls, plain: Any) -> ModelSpec:
        """Raises ConfigError, which names the field."""
        return _checked(cls, plain)

    def located(self, folder: Path) -> ModelSpec:
        """Folders (`./x`, `../x`, `~/x`), as seen from `folder`, by whole paths: who loads them is elsewhere."""
        adapters = {name: _located(source, folder) for name, source in self.adapters.items()}
        return self.model_copy(update={"source": _located(self.source, folder), "adapters": adapters})

    @property
    def weights(self) -> tuple[Any, ...]:
        """What decides results: two specs that differ in it are two revisions of a model."""
        return self.place, self.revision, self.dtype, self.quantization, tuple(sorted(self.adapters.items()))

    @property
    def place(self) -> str:
        """Where its weights come from: its own name, where nothing else is said."""
        return self.source or self.name


class ClusterConfig(Plain):
    """Attributes:
    ray: address of a Ray cluster, "auto" for the one this machine belongs to; None starts one here.
    redis_url: the broker; None starts one here.
    data_dir: blobs and, of what is started here, files and logs.
    host, port: where the gateway listens, if one is started here; port 0 takes a free one.
    gateway: whether one is started here; None for unless both `ray` and `redis_url` are given.
    settings: of the servers' settings, by name, for every process.
    """

    ray: str | None = None
    redis_url: str | None = Field(default=None, repr=False)
    data_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    gateway: bool | None = None
    settings: Mapping[str, Any] = Field(default_factory=dict)
    models: tuple[ModelSpec, ...] = Field(min_length=1)

    @field_validator("models")
    @classmethod
    def _names(cls, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        names = [model.name for model in models]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two models are named {twice!r}")
        return models

    @classmethod
    def read(cls, path: Path) -> ClusterConfig:
        """Raises ConfigError, which names the lines in the file at fault."""
        document = Document.read(path)
        config = _read(cls, document, document.plain)
        return config.model_copy(update={"models": tuple(spec.located(path.parent) for spec in config.models)})


def read_specs(path: Path) -> list[ModelSpec]:
    """Models of a YAML file: one, a list, or a cluster's file. Raises ConfigError, which names lines."""
    document = Document.read(path)
    plain = document.plain
    if isinstance(plain, dict) and "models" in plain:
        specs = list(_read(ClusterConfig, document, plain).models)
    elif isinstance(plain, list):
        specs = [_read(ModelSpec, document, item, index) for index, item in enumerate(plain)]
    else:
        specs = [_read(ModelSpec, document, plain)]
    return [spec.located(path.parent) for spec in specs]


def _located(source: str, folder: Path) -> str:
    """Raises ConfigError."""
    try:
        return str((folder / Path(source).expanduser()).resolve()) if source.startswith((".", "~")) else source
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(f"{source!r} is no folder: {error}") from error


HOMES: Mapping[str, Collection[str]] = {
    "to a model, under `models`": ModelSpec.model_fields,
    "at the top of the file": ClusterConfig.model_fields,
    "under `settings`": Settings.model_fields,
}


def _read(kind: type[P], document: Document, plain: Any, *place: int) -> P:
    """A part of a file. Raises ConfigError."""
    if plain is None and not place:
        raise ConfigError(f"{document.path} is empty")
    try:
        found = kind.model_validate(plain)
    except ValidationError as error:
        raise document.refused([wrong.within(*place) for wrong in mistakes(error.errors(), kind, HOMES)]) from error
    if wrong := list(_settings(found)):
        raise document.refused([one.within(*place) for one in wrong])
    return found


def _settings(found: Plain) -> Iterator[Mistake]:
    """What is wrong with dtype, settings and resources in an entry, or in a file.

    Raises ConfigError where the environment's settings are wrong.
    """
    base = Settings.read()
    if isinstance(found, ModelSpec):
        yield from found.wrong()
        yield from (wrong.within("settings") for wrong in base.mistakes_in(found.settings))
    if isinstance(found, ClusterConfig):
        known = Settings.model_fields
        for name in found.settings.keys() & ClusterConfig.model_fields.keys():
            yield Mistake(("settings", name), "it belongs at the top of the file", at_key=True)
        yield from (wrong.within("settings") for wrong in base.mistakes_in(found.settings, only=known))
        for index, spec in enumerate(found.models):
            yield from (wrong.within("models", index) for wrong in _settings(spec))


def _checked(kind: type[P], plain: Any) -> P:
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(str(mistakes(error.errors(), kind)[0])) from error
