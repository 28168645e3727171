"""The compose file, up on this machine under podman-compose."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import ROOT, run

PROJECT = "interpose-try"
SERVER, HTTP_PORT, HTTPS_PORT = "https://localhost:18443", "127.0.0.1:18080", "127.0.0.1:18443"
MODEL = "SmolLM2-135M-Instruct"
FILES = ("docker-compose.yml", "deploy/compose.cpu.yml")
CLUSTER = f"""\
ray: auto
gateway: false
data_dir: /data
models:
  - name: {MODEL}
    source: /models/{MODEL}
    replicas: {{min: 1, max: 1}}
"""


class Stack:
    """Containers of a project of its own, from an environment file with secrets of its own."""

    def __init__(
        self, compose: Path, folder: Path, models: Path, version: str, others: Mapping[str, str], *, bucket: bool
    ) -> None:
        self.folder = folder
        self._compose = compose
        self._version = version
        self._env = folder / "env"
        self._env.unlink(missing_ok=True)
        run("deploy/new-env", "localhost", self._env)
        cluster = folder / "interpose.yaml"
        cluster.write_text(CLUSTER)
        changes = {
            **{"MODELS_DIR": models, "CLUSTER_FILE": cluster, "VERSION": version, "SHM_SIZE": "512m"},
            **{"OBJECT_STORE_BYTES": 200_000_000, "HTTP_PORT": HTTP_PORT, "HTTPS_PORT": HTTPS_PORT},
            **({"BLOBS": "s3://interpose/blobs"} if bucket else {}),
            **others,
        }
        with self._env.open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in changes.items())

    @property
    def command(self) -> list[str]:
        """The compose command, for this project."""
        files = [part for name in FILES for part in ("-f", name)]
        profiles = ["--profile", "monitoring", "--profile", "s3"]
        return [*map(str, (self._compose, "-p", PROJECT, "--env-file", self._env)), *files, *profiles]

    def up(self, services: Sequence[str]) -> None:
        run(*self.command, "up", "-d", "--no-build", *services)

    def down(self) -> None:
        run(*self.command, "down", "-v", "-t", "5", check=False)

    def backup(self) -> Path:
        path = self.folder / "backup.tar"
        with path.open("wb") as file:
            self._script("backup", stdout=file)
        return path

    def restore(self, path: Path) -> None:
        with path.open("rb") as file:
            self._script("restore", stdin=file)

    def _script(self, name: str, **streams: Any) -> None:
        env = os.environ | {"COMPOSE": " ".join(self.command)}
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | streams
        done = subprocess.run([ROOT / "deploy" / name], env=env, check=False, text=True, **streams)
        if done.returncode:
            raise SystemExit(f"try: deploy/{name} failed\n{done.stderr[-4000:]}")

    def name(self, service: str) -> str:
        return f"{PROJECT}_{service}_1"

    def healthy(self, service: str) -> bool:
        """Whether its own health check passes. There is no systemd here that would run it for podman."""
        done = subprocess.run(
            ["podman", "healthcheck", "run", self.name(service)], capture_output=True, check=False
        )
        return done.returncode == 0

    def exec(self, service: str, *command: str) -> str:
        return run("podman", "exec", self.name(service), *command)

    def secrets(self) -> dict[str, str]:
        """Those of its environment file. An S3 key's name is none: it is in every request, and stores log it."""
        rows = (line.split("=", 1) for line in self._env.read_text().splitlines() if line[:1].isalpha())
        secret = re.compile(r"_PASSWORD$|_SECRET_KEY$|_TOKEN$")
        return {name: value for name, value in rows if secret.search(name) and value}

    def logs(self, service: str, lines: int | None = 40) -> str:
        """The last lines that it wrote, or all of them."""
        tail = [] if lines is None else ["--tail", str(lines)]
        done = subprocess.run(["podman", "logs", *tail, self.name(service)], capture_output=True, check=False)
        return str(done.stdout + done.stderr, errors="replace")

    def kill(self, service: str) -> None:
        """As a crash does: podman would take its own `kill` for our wish that it stay down."""
        os.kill(int(run("podman", "inspect", "-f", "{{.State.Pid}}", self.name(service))), signal.SIGKILL)

    def restart(self, service: str) -> None:
        run("podman", "restart", "-t", "30", self.name(service))

    def users(self) -> dict[str, str]:
        """Service -> the uid of its first process, as the host sees it."""
        found = {}
        for name in run("podman", "ps", "--format", "{{.Names}}", "--filter", f"name={PROJECT}").split():
            pid = run("podman", "inspect", "-f", "{{.State.Pid}}", name).strip()
            match = re.search(r"^Uid:\s+(\d+)", Path("/proc", pid, "status").read_text(), re.MULTILINE)
            found[name.removeprefix(PROJECT + "_").removesuffix("_1")] = match[1] if match else "?"
        return found

    def certificate(self) -> Path:
        """The root that Caddy signed `localhost` with, for clients to trust."""
        path = self.folder / "root.crt"
        path.write_text(self.exec("proxy", "cat", "/data/caddy/pki/authorities/local/root.crt"))
        return path

    def outside(self, key: str, *arguments: str) -> subprocess.Popen[str]:
        """A researcher's process, in the client's image: it sees the proxy alone."""
        script = ROOT / "deploy" / "try" / "outside.py"
        mounts = ["-v", f"{script}:/outside.py:ro", "-v", f"{self.folder / 'root.crt'}:/root.crt:ro"]
        env = {"INTERPOSE_HOST": SERVER, "INTERPOSE_API_KEY": key, "SSL_CERT_FILE": "/root.crt"}
        flags = [part for name in env for part in ("-e", name)]  # Not their values, which `ps` would show.
        command = ["podman", "run", "--rm", "--network", "host", *mounts, *flags]
        command += [f"localhost/interpose-client:{self._version}", "python", "/outside.py", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=os.environ | env, text=True, **pipes)

    def asked(self, key: str, *arguments: str) -> dict[str, object]:
        """The last line such a process prints."""
        process = self.outside(key, *arguments)
        out, err = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(f"try: the client failed\n{out[-2000:]}{err[-4000:]}")
        answer: dict[str, object] = json.loads(out.splitlines()[-1])
        return answer


def until(what: str, ready: Callable[[], object], limit_s: float) -> float:
    """Seconds until a callable says yes. Raises SystemExit beyond the limit."""
    begun = time.monotonic()
    while not ready():
        if time.monotonic() - begun > limit_s:
            raise SystemExit(f"try: {what} isn't there after {limit_s:.0f} s")
        time.sleep(0.5)
    return time.monotonic() - begun
