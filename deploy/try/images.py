"""The images that docker-compose.yml names: ours built from the Dockerfile, others' pulled, or stood in for."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from machine import ROOT, run

OURS = ("client", "gateway", "worker")
STANDINS = {
    "REDIS_IMAGE": "redis",
    "PROXY_IMAGE": "caddy",
    "PROMETHEUS_IMAGE": "prometheus",
    "STORE_IMAGE": "store",
}
"""Variable of docker-compose.yml -> target of standins.Dockerfile."""

BUILD = ("buildah", "bud", "--isolation", "chroot", "--network", "host", "--format", "docker", "--layers")


def exists(image: str) -> bool:
    return bool(run("podman", "images", "-q", image).strip())


def pulled(image: str) -> bool:
    """Whether it is here, perhaps after a pull."""
    if not exists(image):
        run("timeout", "60", "podman", "pull", "-q", image, check=False)
    return exists(image)


def base() -> str:
    """The Dockerfile's base image; from Debian's packages where no registry can be reached."""
    match = re.search(r"^ARG PYTHON_IMAGE=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert match is not None
    image = match[1]
    if pulled(image):
        return image
    with tempfile.TemporaryDirectory() as folder:
        packages = "ca-certificates,python3.11,python3-pip,python3.11-venv"
        run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", f"{folder}/base")
        run(
            "tar",
            "-C",
            f"{folder}/base",
            "--exclude=./var/cache/apt/archives/*.deb",
            "-cf",
            f"{folder}/base.tar",
            ".",
        )
        run("podman", "import", "-q", f"{folder}/base.tar", image)
    return image


def build(version: str, torch_index: str, mounts: Sequence[str]) -> Iterator[tuple[str, float, int]]:
    """Build ours. Yields name, seconds and bytes of each."""
    for target in OURS:
        image, begun = f"localhost/interpose-{target}:{version}", time.monotonic()
        arguments = ["--build-arg", f"TORCH_INDEX={torch_index}", "--target", target, "-t", image]
        run(*BUILD, "--pull-never", *mounts, *arguments, ".")
        size = int(run("podman", "image", "inspect", "-f", "{{.Size}}", image))
        yield image, time.monotonic() - begun, size


def others(mounts: Sequence[str]) -> dict[str, str]:
    """Variable -> image of those that are stood in for, as their own can't be pulled."""
    text = (ROOT / "docker-compose.yml").read_text()
    found = {}
    for variable, target in STANDINS.items():
        match = re.search(rf"\$\{{{variable}:-(\S+)\}}", text)
        assert match is not None, variable
        if pulled(match[1]):
            continue
        image = f"localhost/interpose-standin-{target}:latest"
        file = Path("deploy", "try", "standins.Dockerfile")
        run(*BUILD, "--pull-never", *mounts, "-f", file, "--target", target, "-t", image, "deploy/try")
        found[variable] = image
    return found
