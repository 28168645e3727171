"""The images and the compose file, for real, on a machine without a docker engine: `python deploy/try`.

Builds the images with buildah, brings docker-compose.yml up with podman-compose under deploy/compose.cpu.yml, uses
it from outside, kills each part of it under load, takes it down, and says what it saw. Needs root, podman,
buildah and runc (apt-get install podman buildah runc netavark aardvark-dns catatonit iptables debootstrap).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import images
import machine
from machine import say, timed
from stack import MODEL, Stack, until
from use import use

SERVICES = ("redis", "gateway", "ray-head", "proxy", "prometheus")


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/try", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help=f"folder that has {MODEL}, as a folder")
    parser.add_argument(
        "--torch-index", default="", help="for the worker's image; the CPU build's, if it can be reached"
    )
    parser.add_argument(
        "--bucket", action="store_true", help="uploads and results in the S3 store of the profile s3"
    )
    parser.add_argument("--skip-build", action="store_true", help="with the images of the last time")
    parser.add_argument("--keep", action="store_true", help="leave the stack up")
    wanted = parser.parse_args()
    if lacks := machine.missing():
        print(f"try: this machine lacks {', '.join(lacks)}", file=sys.stderr)
        return 77
    folder = machine.ROOT / ".cache" / "try"
    folder.mkdir(parents=True, exist_ok=True)
    machine.configure(folder)
    compose, mounts = machine.compose_command(folder), machine.pip_mounts(folder)
    timed("base image", images.base)
    for image, seconds, size in () if wanted.skip_build else images.build("try", wanted.torch_index, mounts):
        say(f"built {image}, {size / 1e6:.0f} MB", seconds)
    others = timed("images of others", lambda: images.others(mounts))
    for variable, image in others.items():
        say(f"  {variable} can't be pulled here: {image} stands in")

    stack = Stack(compose, folder, wanted.models, "try", others, bucket=wanted.bucket)
    services = (*SERVICES, "store") if wanted.bucket else SERVICES
    stack.down()
    try:
        timed("podman-compose up", lambda: stack.up(services))
        for service in services:
            say(f"  {service} is healthy after", until(service, partial(stack.healthy, service), 300))
        use(stack, services)
    except BaseException:
        for service in services:
            print(f"---- {service}\n{stack.logs(service)}", file=sys.stderr)
        raise
    finally:
        if not wanted.keep:
            timed("podman-compose down", stack.down)
    print("everything that was tried works")
    return 0


if __name__ == "__main__":
    sys.exit(main())
