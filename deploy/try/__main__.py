"""The images and the compose file, for real, on a machine without a docker engine: `python deploy/try`.

Builds the images with buildah, brings docker-compose.yml up with podman-compose under deploy/compose.cpu.yml, uses
it from outside, kills and restarts parts of it under load, takes it down, and says what it saw. Needs root, podman,
buildah and runc (apt-get install podman buildah runc netavark aardvark-dns catatonit iptables debootstrap).
"""

from __future__ import annotations

import argparse
import json
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import images
import machine
from stack import MODEL, SERVER, Stack, until

SERVICES = ("redis", "gateway", "ray-head", "proxy", "prometheus")
JOBS = 40


def say(text: str, seconds: float | None = None) -> None:
    print(f"{text:78}" + ("" if seconds is None else f"{seconds:8.1f} s"), flush=True)


def timed(text: str, work: Callable[[], Any]) -> Any:
    begun = time.monotonic()
    found = work()
    say(text, time.monotonic() - begun)
    return found


def fetch(path: str, root: Path, key: str = "") -> tuple[int, str]:
    """Status and body of a GET through the proxy."""
    try:
        context = ssl.create_default_context(cafile=str(root))
        asked = urllib.request.Request(SERVER + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        with urllib.request.urlopen(asked, context=context, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def furthest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference, in parts of the largest value."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(map(abs, theirs))


def same(ours: list[Any], theirs: list[Any]) -> int:
    """How many jobs gave the same tokens, and the same norm but for what company may move (docs/numbers.md)."""
    return sum(a[1] == b[1] and abs(a[0] - b[0]) <= 1e-4 * abs(b[0]) for a, b in zip(ours, theirs, strict=True))


def use(stack: Stack) -> None:
    say(f"first processes run as {', '.join(f'{s}:{u}' for s, u in sorted(stack.users().items()))}")
    root = stack.certificate()
    until("a model", lambda: fetch("/readyz", root)[0] == 200, 600)
    key = stack.exec("gateway", "interpose", "keys", "create", "--user", "ada").strip().splitlines()[-1]
    say("a key was made in the gateway's container; researchers see only the proxy")
    assert fetch("/metrics", root)[0] == 404, "figures are to be had from outside"
    say("/metrics from outside: 404")

    ours = timed("a job from outside, in the client's image without torch", lambda: stack.asked(key, "numbers"))
    reference = stack.exec("ray-head", "python", "-c", (Path(__file__).parent / "reference.py").read_text(),
                           f"/models/{MODEL}")  # fmt: skip
    theirs = json.loads(reference.splitlines()[-1])
    off = {name: furthest(ours[name], theirs[name]) for name in theirs}
    apart = ", ".join(f"{name} by {value:.1e}" for name, value in off.items())
    say(f"beside transformers with a hook, relative: {apart}")
    assert max(off.values()) < 1e-4, off

    calm = timed(f"{JOBS} generations at once, undisturbed", lambda: stack.asked(key, "load", str(JOBS)))
    for service, act, word in (("ray-head", stack.kill, "killed"), ("gateway", stack.restart, "restarted"),
                               ("redis", stack.restart, "restarted")):  # fmt: skip
        disturbed(stack, root, key, calm["results"], service, act, word)

    ids = stack.asked(key, "load", "3")["results"]
    process = stack.outside(key, "load", "3")
    assert process.stdout is not None
    submitted = json.loads(process.stdout.readline())["submitted"]
    assert process.wait(300) == 0
    process.communicate()
    stack.restart("redis")
    until("Redis", lambda: fetch("/readyz", root)[0] == 200, 60)
    kept = stack.asked(key, "again", *submitted)
    assert same([kept[job] for job in submitted], ids) == 3
    say("after another restart of Redis: the key works, 3 of 3 earlier results are fetched from it")

    before = stack.backup()
    late = stack.exec("gateway", "interpose", "keys", "create", "--user", "bob").strip().splitlines()[-1]
    stack.restore(before)
    until("a model", lambda: fetch("/readyz", root)[0] == 200, 600)
    assert (fetch("/v1/me", root, key)[0], fetch("/v1/me", root, late)[0]) == (200, 401)
    assert stack.asked(key, "load", "3")["ended"] == {"completed": 3}
    say(f"a backup of {before.stat().st_size / 1e6:.1f} MB was restored: keys are those of its time, jobs run")

    query = "sum by (outcome) (interpose_ended_jobs)"
    figures = until_scraped(stack, query)
    say(f"Prometheus has {query}: {figures}")


def disturbed(
    stack: Stack, root: Path, key: str, calm: list[Any], service: str, act: Callable[[str], None], word: str
) -> None:
    """Jobs from outside while a part dies: all end once, with the results they have without that."""
    process, begun = stack.outside(key, "load", str(JOBS)), time.monotonic()
    assert process.stdout is not None
    json.loads(process.stdout.readline())
    time.sleep(1)
    act(service)
    died = time.monotonic()
    time.sleep(1)
    back = until(service, lambda: stack.healthy(service) and fetch("/readyz", root)[0] == 200, 300)
    out, err = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"try: the client failed\n{err[-4000:]}")
    found = json.loads(out.splitlines()[-1])
    say(f"{service} {word} under load: ready again", back + 1)
    say(f"  {JOBS} jobs: {found['ended']}, {same(found['results'], calm)} with the results of the calm run",
        time.monotonic() - begun)  # fmt: skip
    assert found["ended"] == {"completed": JOBS} and died
    assert same(found["results"], calm) == JOBS


def until_scraped(stack: Stack, query: str) -> dict[str, str]:
    url = "http://prometheus:9090/api/v1/query?" + urllib.parse.urlencode({"query": query})
    code = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
    found: dict[str, str] = {}

    def scraped() -> bool:
        answer = json.loads(stack.exec("gateway", "python", "-c", code, url))
        found.update({row["metric"]["outcome"]: row["value"][1] for row in answer["data"]["result"]})
        return bool(found)

    until("a scrape", scraped, 60)
    return found


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
        for service in SERVICES:
            if service != "prometheus":
                say(f"  {service} is healthy after", until(service, partial(stack.healthy, service), 300))
        use(stack)
    except BaseException:
        for service in SERVICES:
            print(f"---- {service}\n{stack.logs(service)}", file=sys.stderr)
        raise
    finally:
        if not wanted.keep:
            timed("podman-compose down", stack.down)
    print("everything that was tried works")
    return 0


if __name__ == "__main__":
    sys.exit(main())
