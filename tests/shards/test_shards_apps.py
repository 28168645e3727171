"""Models are deployed, and taken down, on a Serve that is played."""

from __future__ import annotations

import time
from typing import Any

import pytest
from interpose.errors import ConfigError
from interpose_server.models.spec import ModelSpec
from interpose_server.settings import Settings
from interpose_server.shards.naming import app_name


class Notes:
    def __init__(self) -> None:
        self.kept: Any = {"a": 1, "b": 2, "c": 3}

    def read(self, name: str) -> Any:
        return self.kept

    def write(self, name: str, value: Any) -> None:
        self.kept = value


class Serve:
    """A's copy goes in a moment, and B's hangs."""

    def __init__(self) -> None:
        self.applications = {app_name(model): None for model in "abc"}
        self.asked_at: dict[str, float] = {}

    def status(self) -> Serve:
        if time.monotonic() > self.asked_at.get(app_name("a"), float("inf")) + 0.2:
            self.applications.pop(app_name("a"), None)
        return self

    def delete(self, name: str, _blocking: bool = True) -> None:
        assert not _blocking, "it would raise after a minute"
        self.asked_at[name] = time.monotonic()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Serve's own, as it is imported
@pytest.mark.parametrize("models, wait_s, expected_s", [("ab", 0.6, 0.6), ("a", 5.0, 0.2), ("ab", 0.0, 0.0)])
def test_a_copy_that_hangs_is_waited_for_no_longer_than_said(
    monkeypatch: pytest.MonkeyPatch, models: str, wait_s: float, expected_s: float
) -> None:
    from interpose_server.shards import apps

    serve, notes = Serve(), Notes()
    monkeypatch.setattr(apps, "serve", serve)
    monkeypatch.setattr(apps, "Notes", lambda: notes)
    monkeypatch.setattr(apps, "states", lambda: {**notes.kept})
    began = time.monotonic()
    apps.remove([*models, "unknown"], wait_s)
    assert expected_s <= time.monotonic() - began < expected_s + 1
    assert {*serve.asked_at} == {app_name(model) for model in models}
    assert notes.kept.keys() == {*"abc"} - {*models}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "odd", [{"resources": {"GPU": 1}}, {"resources": {"fast": -1}}, {"settings": {"worker_threads": 10**400}}]
)
def test_a_model_that_ray_does_not_take_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, odd: dict[str, Any]
) -> None:
    """As an entry of an earlier version may say."""
    from interpose_server.shards import apps

    notes, deployed = Notes(), list[str]()
    notes.kept = {}
    monkeypatch.setattr(apps, "Notes", lambda: notes)
    monkeypatch.setattr(apps, "states", dict)
    for name in ("has_gpus", "has_room"):
        monkeypatch.setattr(apps, name, lambda *_: True)
    monkeypatch.setattr(apps.serve, "run_many", lambda targets, **_: deployed.extend(one.name for one in targets))
    specs = [ModelSpec(name=name, devices=1, **(odd if name == "b" else {})) for name in "abc"]
    applied = apps.apply(specs, Settings())
    assert deployed == [app_name("a"), app_name("c")] and applied.changed == ["a", "c"]
    assert notes.kept.keys() == {"a", "c"}
    (refused,) = applied.refused.values()
    assert isinstance(refused, ConfigError) and "b asks for" in refused.message
