"""Every code block of the README and of docs/ runs, and prints what it says it prints."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import INTERPOSE, Served, serve

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MODEL = "SmolLM2-135M-Instruct"
END = "\x1e"


def blocks(document: Path) -> list[tuple[str, str]]:
    """(language, text) of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(f"{MODEL}={smollm2}", data_dir=tmp_path_factory.mktemp("docs")) as server:
        yield server


def having(language: str) -> pytest.MarkDecorator:
    """Each document with such a block."""
    found = [document for document in DOCUMENTS if language in dict(blocks(document))]
    return pytest.mark.parametrize("document", found, ids=lambda path: path.name)


@pytest.mark.slow
@having("python")
def test_python_blocks_print_what_they_say(document: Path, served: Served) -> None:
    found = blocks(document)
    script, expected = "", []
    for index, (language, text) in enumerate(found):
        if language == "python":
            said = found[index + 1] if index + 1 < len(found) else ("", "")
            expected.append(said[1].strip() if said[0] == "text" else "")
            script += f"{text}\nprint({END!r})\n"
    script = script.replace('"http://127.0.0.1:8000"', repr(served.host)).replace('"ip_..."', repr(served.key))
    done = subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, env=os.environ | served.env
    )
    assert done.returncode == 0, done.stderr
    assert [part.strip() for part in done.stdout.split(END)[:-1]] == expected


@pytest.mark.slow
@having("bash")
def test_shell_blocks_run(document: Path, smollm2: Path, tmp_path: Path) -> None:
    models = tmp_path / ".cache/interpose/models"
    models.mkdir(parents=True)
    (models / MODEL).symlink_to(smollm2)
    for language, text in blocks(document):
        env = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
        env["HOME"] = str(tmp_path)
        for line in text.splitlines() if language == "bash" else ():
            run_line(shlex.split(line), env)


def run_line(words: list[str], env: dict[str, str]) -> None:
    match words:
        case ["make", target]:
            subprocess.run(["make", "-n", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        case ["pip", "install", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert what == "." or what.removeprefix(".[").removesuffix("]") in extras
        case ["export", setting]:
            name, _, value = setting.partition("=")
            env[name] = value
        case ["interpose", "serve", *rest]:
            serves([word.replace("0.0.0.0", "127.0.0.1") for word in rest], env)
        case ["interpose", *rest]:
            subprocess.run([INTERPOSE, *rest], env=env, check=True, stdout=subprocess.DEVNULL)
        case _:
            raise AssertionError(f"a line of a kind nobody checks: {shlex.join(words)}")


def serves(arguments: list[str], env: dict[str, str]) -> None:
    """`interpose serve` with these arguments becomes ready, and ends when asked to."""
    command = [INTERPOSE, "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if line.startswith("ready at"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, "".join(told)
    assert any(line.startswith("ready at") for line in told), "".join(told)
