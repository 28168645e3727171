"""What the command says to somebody who got it wrong: one line with advice, never a traceback."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from interpose_server.datadir import DataDir
from serving import INTERPOSE


def ends_with(data_dir: Path, *arguments: str, **env: str) -> str:
    """The last line on stderr of a command that fails."""
    command = [INTERPOSE, *arguments, "--data-dir", data_dir]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "/no/such"), "no folder '/no/such'"),
        (("serve", "x=/no/such"), "no folder '/no/such'"),
        (("serve", "a b"), "a model's name is"),
        (("serve", "org/name", "org/name"), "the same name"),
        (("serve", "org/name", "--host", "0.0.0.0", "--port", "0"), "there are no keys"),
        (("serve", "org/name", "--port", "0", "--redis-url", "redis://127.0.0.1:1"), "Redis can't be used"),
        (("keys", "create", "--user", "a b"), "a user's name is"),
        (("keys", "revoke", "abcd"), "no key 'abcd'"),
        (("keys", "list", "--redis-url", "nowhere"), "the Redis URL can't be read"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in ends_with(tmp_path, *arguments)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = ends_with(tmp_path, "serve", "org/name", "--port", str(taken.getsockname()[1]))
    assert "already in use" in said
    assert "--port" in said


def test_a_data_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "can't be made" in ends_with(tmp_path / "file" / "data", "serve", "org/name")


def test_settings_that_are_wrong(tmp_path: Path) -> None:
    serve = ("serve", "org/name", "--port", "0")
    for name, value, told in (
        ("LEASE_S", "-1", "INTERPOSE_SERVER_LEASE_S: has to be above 0, not '-1'"),
        ("LEASE", "3", "no setting INTERPOSE_SERVER_LEASE; did you mean INTERPOSE_SERVER_LEASE_S?"),
        ("LIMITS", '{"wal_s": 3}', "no limit 'wal_s'; did you mean wall_s?"),
        ("LIMITS", "{wall_s: 3}", 'INTERPOSE_SERVER_LIMITS has to be JSON, such as {"wall_s": 60}'),
    ):
        assert told in ends_with(tmp_path, *serve, **{f"INTERPOSE_SERVER_{name}": value})


def test_folder_and_redis_come_from_the_environment_too(tmp_path: Path) -> None:
    env = os.environ | {
        "INTERPOSE_SERVER_REDIS_URL": "redis://127.0.0.1:1",
        "INTERPOSE_SERVER_DATA_DIR": str(tmp_path),
    }
    done = subprocess.run([INTERPOSE, "keys", "list"], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "Redis can't be used" in done.stderr


def test_what_runs_on_a_data_folder_is_told_apart(tmp_path: Path) -> None:
    config, data = tmp_path / "lab.yaml", DataDir(tmp_path / "data")
    config.write_text(f"data_dir: {data.path}\nmodels: [{{name: a}}]")

    def said() -> str:
        return subprocess.run([INTERPOSE, "deploy", "status", config], capture_output=True, text=True).stderr

    assert "nothing is deployed on" in said()
    data.lock()
    try:
        assert "a cluster is starting or stopping on" in said()
        data.note(verb="deploy up", pid="1")
        assert "a cluster is starting or stopping on" in said()
        data.note(verb="serve", pid="1")
        assert "`interpose serve` runs on" in said()
    finally:
        data.unlock()


def test_a_catalogue_without_a_server_says_so(tmp_path: Path) -> None:
    command = [INTERPOSE, "models", "list", "--data-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        f"no server runs on {tmp_path}; --data-dir names another folder",
        "there are no models; `interpose models add` adds one",
    ]


def test_the_version() -> None:
    done = subprocess.run([INTERPOSE, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("interpose ")
