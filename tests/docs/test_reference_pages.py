"""The pages that list what can be set: everything the code knows, once, with its default; and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from interpose.cli.main import app
from interpose.config import CONFIG, Config
from interpose.graph.limits import Limits
from interpose_server.metrics import Metrics
from interpose_server.models.spec import ClusterConfig, ModelSpec, Replicas
from interpose_server.settings import OF_WORKERS, PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")), *sorted(DOCS.glob("*.md"))]
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
DECIDED = {
    "data_dir": "the user's own",
    "valkey_fsync": "by command",
    "limits": "those [below](#limits-of-one-job)",
    "batch_tokens": "measured",
    "batch_memory_bytes": "0.4 of what is free",
    "worker_threads": "by cores",
}
"""Settings whose default is no value: what the page says in its place."""

FOLLOWS = {
    ClusterConfig: {
        "redis_url": f"`{PREFIX}REDIS_URL`",
        "data_dir": f"`{PREFIX}DATA_DIR`",
        "gateway": "by the others",
    },
    ModelSpec: {
        "source": "the name",
        "revision": "the newest",
        **dict.fromkeys(("dtype", "quantization"), "as saved"),
        **dict.fromkeys(("devices", "placement", "shards"), "by size"),
        "device_memory": "asked",
    },
}
"""The same of a cluster's file and a model's fields."""


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in it, heads left out."""
    lines = re.findall(r"^\| (`.*) \|$", text, re.M)
    return [re.split(r" *\| *", line) for line in lines]


def chapter(page: str, title: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    level = title.partition(" ")[0]
    text = re.sub(r"^```.*?^```$", "", (DOCS / page).read_text("utf-8"), flags=re.M | re.S)
    found = re.split(rf"^#{{1,{len(level)}}} .*$", text.partition(f"\n{title}\n")[2], maxsplit=1, flags=re.M)
    assert found[0].strip(), f"{page} has nothing under {title!r}"
    return found[0]


def value(text: str) -> Any:
    """What a cell says: "20 GiB" and "1,000" are numbers."""
    number, _, unit = text.partition(" ")
    if re.fullmatch(r"[\d,]+(\.\d+)?", number) and unit in ("", *UNITS):
        return float(number.replace(",", "")) * UNITS.get(unit, 1)
    return {"none": None, "true": True, "false": False}.get(text, text)


def told(text: str) -> dict[str, str]:
    """Name -> default of each row of its tables, none of them twice."""
    found = [(re.findall(r"`([^`]+)`", name)[0], default) for name, default, *_ in rows(text)]
    assert len(dict(found)) == len(found)
    return dict(found)


def plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def test_every_setting_of_the_server_is_told_once() -> None:
    text = chapter("settings.md", "## The server")
    found = {
        name.lower(): default for name, default in told(re.sub(r"^\| `INTERP.*$", "", text, flags=re.M)).items()
    }
    assert found.keys() == Settings.model_fields.keys()
    for name, default in found.items():
        field = Settings.model_fields[name]
        if name in DECIDED:
            assert default == DECIDED[name]
        else:
            assert value(default) == plain(field.get_default()) or default == str(plain(field.get_default())), name
    starred = {name.lower() for name in re.findall(r"^\| `(\w+)` \* \|", text, re.M)}
    assert starred == OF_WORKERS


def test_every_limit_is_told_once() -> None:
    found = told(chapter("settings.md", "## Limits of one job"))
    assert found.keys() == {field.name for field in fields(Limits)}
    assert {name: value(text) for name, text in found.items()} == Limits().as_dict()


def test_every_setting_of_the_client_is_told_once() -> None:
    found = [row for row in rows(chapter("settings.md", "## The client")) if row[0].startswith("`CONFIG.")]
    known = {setting.name: setting for setting in vars(Config).values() if type(setting).__name__ == "_Setting"}
    assert [name.strip("`").removeprefix("CONFIG.").lower() for name, *_ in found] == list(known)
    for (name, variable, default, _), setting in zip(found, known.values(), strict=True):
        assert hasattr(CONFIG, name.strip("`").removeprefix("CONFIG."))
        assert variable.strip("`") == setting.env[0]
        assert value(default) == setting.default


def test_every_field_of_the_file_is_told_once() -> None:
    file, model = chapter("cluster.md", "## The file").split("| of a model |")
    for text, kind in ((file, ClusterConfig), (model, ModelSpec)):
        found = told(text)
        assert found.keys() == kind.model_fields.keys()
        for name, field in kind.model_fields.items():
            default = "" if field.is_required() else field.get_default(call_default_factory=True)
            if name in FOLLOWS[kind]:
                assert default in (None, "", "auto")
                assert found[name] == FOLLOWS[kind][name]
            else:
                assert value(found[name]) == spelt(default), name


def spelt(default: Any) -> Any:
    """A field's default as the page has it."""
    if isinstance(default, Replicas):
        return f"`{{min: {default.min}, max: {default.max}}}`"
    return None if default in ((), {}) else default


def variables(*folders: str) -> set[str]:
    texts = [path.read_text("utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {name for text in texts for name in re.findall(r"\bINTERPOSE_[A-Z][A-Z_]*[A-Z]\b", text)}


def test_every_variable_is_told() -> None:
    """Whatever name of ours the packages read; those of `Settings` go by their tables."""
    text = (DOCS / "settings.md").read_text("utf-8")
    ours = {name for name in variables("client", "server") if not name.startswith(PREFIX)}
    assert len(ours) > 8
    assert {name for name in ours if f"`{name}`" not in text} == set()


def known_variables() -> set[str]:
    server = {PREFIX + name.upper() for name in Settings.model_fields}
    return server | variables("client", "server", "scripts", "tests/deploy") | {PREFIX.rstrip("_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_page_names_a_setting_there_isnt(page: Path) -> None:
    text = page.read_text("utf-8")
    named = set(re.findall(r"\bINTERPOSE_[A-Z][A-Z_]*[A-Z]\b", text))
    assert named <= known_variables()
    units = "S|BYTES|USER|TOTAL|ROWS|JOBS|TOKENS|BURST|THREADS"
    short = set(re.findall(rf"`((?!{PREFIX})[A-Z]+(?:_[A-Z]+)*_(?:{units}))`", text))
    assert {name.lower() for name in short} <= Settings.model_fields.keys()
    for name in re.findall(r"\bCONFIG\.([A-Z_]+)\b", text):
        assert hasattr(CONFIG, name), name


def commands(group: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """Name -> command, as Typer has it."""
    if not hasattr(group, "commands"):
        yield " ".join(path), group
        return
    for name, command in group.commands.items():
        yield from commands(command, *path, name)


def options(command: Any) -> Mapping[str, Any]:
    """Option -> its default."""
    found = [one for one in command.params if one.param_type_name == "option" and one.name != "help"]
    return {one.opts[-1]: one.default for one in found}


def test_every_command_and_option_is_told_once() -> None:
    text = (DOCS / "commands.md").read_text("utf-8")
    parts = re.split(r"^## `interpose (.*)`$", text, flags=re.M)
    first, sections = parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))
    main = typer.main.get_command(app)
    found = {re.match(r"[a-z]+(?: [a-z]+)*", head)[0]: (head, body) for head, body in sections.items()}  # type: ignore[index]
    assert [name for name, *_ in rows(first)] == [f"`{name}`" for name in options(main)]
    known = dict(commands(main))
    assert len(known) > 15
    assert found.keys() == known.keys()
    for name, command in known.items():
        head, body = found[name]
        given = [one for one in command.params if one.param_type_name == "argument"]
        assert len(re.findall(r"[A-Z]+(?:\.\.\.)?", head)) == len(given), name
        named = [(option, row[1]) for row in rows(body) for option in re.findall(r"`(--[\w-]+)`", row[0])]
        assert dict(named).keys() == options(command).keys(), name
        assert len(dict(named)) == len(named)
        for option, default in options(command).items():
            if default not in (None, False, "", "auto") and not callable(default):
                assert value(dict(named)[option]) == default, (name, option)


def test_every_figure_is_told_once() -> None:
    own, seen = (DOCS / "figures.md").read_text("utf-8").split("What each gateway sees")
    metrics = {id(metric): metric for metric in vars(Metrics()).values() if hasattr(metric, "_labelnames")}
    known = {f"{one._name}{'_total' * (one._type == 'counter')}": one for one in metrics.values()}
    found = [(name.strip("`"), labels, part is own) for part in (own, seen) for name, labels, _ in rows(part)]
    assert sorted(name for name, *_ in found) == sorted(known)
    for name, labels, alone in found:
        assert tuple(filter(None, labels.split(", "))) == known[name]._labelnames, name
        assert alone or known[name]._type == "gauge", name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_page_names_a_figure_there_isnt(page: Path) -> None:
    known = {name for name, *_ in rows((DOCS / "figures.md").read_text("utf-8"))}
    named = {f"`{name}`" for name in re.findall(r"`(interpose_[a-z_]+)`", page.read_text("utf-8"))}
    assert named - {"`interpose_server`"} <= known
