"""What this machine has for it: podman with settings of its own, and pip's way to packages, for use in builds."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CERTIFICATES = Path("/etc/ssl/certs")


def say(text: str, seconds: float | None = None) -> None:
    print(f"{text:78}" + ("" if seconds is None else f"{seconds:8.1f} s"), flush=True)


def timed(text: str, work: Callable[[], Any]) -> Any:
    begun = time.monotonic()
    found = work()
    say(text, time.monotonic() - begun)
    return found


def run(*command: str | Path, env: Mapping[str, str] | None = None, check: bool = True, quiet: bool = True) -> str:
    """A command's standard output. Raises SystemExit with all it said if it fails, but with `check=False`."""
    done = subprocess.run(
        list(map(str, command)),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
        env=os.environ | (env or {}),
        cwd=ROOT,
        check=False,
    )
    if check and done.returncode:
        raise SystemExit(f"try: {' '.join(map(str, command))}\n{done.stdout[-4000:]}{(done.stderr or '')[-4000:]}")
    return done.stdout


def missing() -> list[str]:
    """Commands that it needs and this machine lacks."""
    return [name for name in ("podman", "buildah", "runc") if shutil.which(name) is None]


def configure(folder: Path) -> None:
    """Have podman and buildah run with a configuration of ours: limits that this machine allows, runc."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard if hard != resource.RLIM_INFINITY else 1 << 20, 1 << 20)
    path = folder / "containers.conf"
    path.write_text(
        f'[containers]\ndefault_ulimits = ["nofile={most}:{most}", "nproc=16384:16384"]\nlog_driver = "k8s-file"\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    )
    os.environ["CONTAINERS_CONF"] = str(path)


def compose_command(folder: Path) -> Path:
    """podman-compose: this machine's, or one installed for this."""
    if found := shutil.which("podman-compose"):
        return Path(found)
    where = folder / "venv"
    if not (where / "bin" / "podman-compose").exists():
        venv.create(where, with_pip=True)
        run(where / "bin" / "python", "-m", "pip", "install", "-q", "podman-compose==1.6.0")
    return where / "bin" / "podman-compose"


def pip_mounts(folder: Path) -> list[str]:
    """Arguments with which a build's pip finds packages as this machine's does."""
    found: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = value.strip("'")
    found.pop("constraint", None)
    path = folder / "pip.conf"
    path.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items()))
    local = {f"/{Path(part).parts[1]}/{Path(part).parts[2]}" for part in _folders(found.values())}
    mounts = [f"{path}:/etc/pip.conf:ro", *(f"{part}:{part}:ro" for part in sorted(local))]
    if CERTIFICATES.is_dir():
        mounts.append(f"{CERTIFICATES}:{CERTIFICATES}:ro")
    return [part for mount in mounts for part in ("--volume", mount)]


def _folders(values: Iterable[str]) -> list[str]:
    """Folders of this machine that pip's settings name."""
    words = [word.removeprefix("file://") for value in values for word in value.split()]
    return [word for word in words if re.match(r"/[^/]+/[^/]+", word) and Path(word).is_dir()]
