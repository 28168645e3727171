"""What the pages tell operators to write: every command there is, every file and every setting holds."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from interpose.cli.main import app
from interpose_server.models.devices import Devices
from interpose_server.models.packing import packs
from interpose_server.models.planning import plan_for
from interpose_server.models.spec import ClusterConfig
from interpose_server.settings import PREFIX, Settings
from published import written

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S)


def commands(document: Path) -> Iterator[list[str]]:
    """Words of each line that runs `interpose`, also in a container."""
    for text in blocks(document, "(?:sh|bash)"):
        for line in text.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|exec [\w-]+ |-- +)interpose (.*?)( &)?$", line)
            if found:
                yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_understood(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(document):
        for word in words:
            if word.endswith(".pem"):
                (tmp_path / word).touch()
        group: Any = typer.main.get_command(app)
        rest = list(words)
        while hasattr(group, "commands"):
            name = rest.pop(0)
            assert name in group.commands, words
            group = group.commands[name]
        group.make_context(group.name, rest).close()


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_commands_in_prose_are_there(document: Path) -> None:
    """As in `interpose deploy up | status FILE`: alternatives are of one group, options of the command."""
    prose = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.M | re.S)
    for text in re.findall(r"`interpose ([a-z][^`]*)`", prose):
        words, group, command = text.split(), typer.main.get_command(app), None
        while words and hasattr(group, "commands"):
            command = group.commands[words.pop(0)]
            while words[:1] == ["|"]:
                assert words[1] in group.commands, text
                del words[:2]
            group = command
        known = {option for one in getattr(command, "params", ()) for option in one.opts}
        assert {word for word in words if word.startswith("--")} <= known, text


def test_extras_that_are_named_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    said = [
        path.read_text("utf-8") for path in (*DOCUMENTS, *ROOT.glob("client/**/*.py"), *ROOT.glob("server/**/*.py"))
    ]
    named = {
        name
        for text in said
        for found in re.findall(r"(?:\binterpose|\.)\[([a-z0-9,]+)\]\"", text)
        for name in found.split(",")
    }
    assert {"local", "server", "cluster", "s3"} <= named <= project["optional-dependencies"].keys()


def test_there_are_such_commands() -> None:
    assert [words[:2] for words in commands(ROOT / "docs" / "cluster.md")] == [
        *(["deploy", "up"], ["deploy", "status"], ["deploy", "down"], ["deploy", "down"]),
    ]
    assert len(list(commands(ROOT / "docs" / "operating.md"))) > 4


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_settings_hold(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in blocks(document, "yaml"):
        if re.search("^models:", text, re.M):
            (tmp_path / "lab.yaml").write_text(text)
            assert ClusterConfig.read(tmp_path / "lab.yaml").models
    for text in blocks(document, "(?:sh|bash)"):
        for name, value in re.findall(rf"^(?:export )?({PREFIX}\w+)=(.*)$", text, re.M):
            monkeypatch.setenv(name, value.strip("'"))
    Settings.read()


def test_the_guides_models_fit_on_the_machine_it_names(tmp_path: Path) -> None:
    """All of them at once, in as many copies as there may be."""
    text = (ROOT / "docs" / "operating.md").read_text("utf-8").partition("## 4. Models")[2]
    stated = re.search(r"\d+x\d+GB", text)
    assert stated is not None
    machine = Devices.parse(stated[0])
    (tmp_path / "lab.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)[0])
    copies = []
    for spec in ClusterConfig.read(tmp_path / "lab.yaml").models:
        config = written(spec.place.rpartition("/")[2].removesuffix("-Instruct"))
        plan = plan_for(spec.model_copy(update={"source": str(config)}), machine)
        parts = plan.parts if spec.devices is None else (spec.devices,)
        assert sum(plan.parts) <= sum(parts)
        copies += [parts] * spec.replicas.max
    assert len(copies) == 4
    assert packs(copies, [float(len(node)) for node in machine.nodes])
