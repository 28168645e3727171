"""What is done with the stack once it is up: jobs from outside while each part dies, a backup, figures, secrets."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figures
import leaks
from machine import say, timed
from stack import MODEL, SERVER, Stack, until

JOBS = 40


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


def use(stack: Stack, services: Sequence[str]) -> None:
    say(f"first processes run as {', '.join(f'{s}:{u}' for s, u in sorted(stack.users().items()))}")
    root = stack.certificate()
    until("a model", lambda: fetch("/readyz", root)[0] == 200, 600)
    key = stack.exec("gateway", "interpose", "keys", "create", "--user", "ada").strip().splitlines()[-1]
    say("a key was made in the gateway's container; researchers see only the proxy")
    assert fetch("/metrics", root)[0] == 404, "figures are to be had from outside"
    say("/metrics from outside: 404")
    compared(stack, key)

    calm = timed(f"{JOBS} generations at once, undisturbed", lambda: stack.asked(key, "load", str(JOBS)))
    for service in sorted(services, key=lambda service: service == "ray-head"):
        disturbed(stack, root, key, calm["results"], service)
    kept(stack, root, key)
    restored(stack, root, key)
    figures.check(stack)
    leaks.check(stack, {"a researcher's key": key})


def compared(stack: Stack, key: str) -> None:
    """The numbers that come over the network are those of the library alone."""
    ours = timed("a job from outside, in the client's image without torch", lambda: stack.asked(key, "numbers"))
    script = (Path(__file__).parent / "reference.py").read_text()
    reference = stack.exec("ray-head", "python", "-c", script, f"/models/{MODEL}")
    theirs = json.loads(reference.splitlines()[-1])
    off = {name: furthest(ours[name], theirs[name]) for name in theirs}
    apart = ", ".join(f"{name} by {value:.1e}" for name, value in off.items())
    say(f"beside transformers with a hook, relative: {apart}")
    assert max(off.values()) < 1e-4, off


def disturbed(stack: Stack, root: Path, key: str, calm: list[Any], service: str) -> None:
    """Jobs from outside while a part dies: all end once, with the results they have without that."""
    process, begun = stack.outside(key, "load", str(JOBS)), time.monotonic()
    assert process.stdout is not None
    json.loads(process.stdout.readline())
    time.sleep(1)
    stack.kill(service)
    time.sleep(1)
    back = until(service, lambda: stack.healthy(service) and fetch("/readyz", root)[0] == 200, 300)
    out, err = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"try: the client failed\n{err[-4000:]}")
    found = json.loads(out.splitlines()[-1])
    say(f"{service} killed under load: healthy again, and the server ready", back + 1)
    say(f"  {JOBS} jobs: {found['ended']}, {same(found['results'], calm)} with the results of the calm run",
        time.monotonic() - begun)  # fmt: skip
    assert found["ended"] == {"completed": JOBS}
    assert same(found["results"], calm) == JOBS


def kept(stack: Stack, root: Path, key: str) -> None:
    """Keys and results outlive an orderly restart of Redis."""
    values = stack.asked(key, "load", "3")["results"]
    process = stack.outside(key, "load", "3")
    assert process.stdout is not None
    submitted = json.loads(process.stdout.readline())["submitted"]
    assert process.wait(300) == 0
    process.communicate()
    stack.restart("redis")
    until("Redis", lambda: fetch("/readyz", root)[0] == 200, 60)
    again = stack.asked(key, "again", *submitted)
    assert same([again[job] for job in submitted], values) == 3
    say("after a restart of Redis: the key works, 3 of 3 earlier results are fetched from it")


def restored(stack: Stack, root: Path, key: str) -> None:
    """A backup that was taken under load brings back what was then."""
    process = stack.outside(key, "load", str(JOBS))
    assert process.stdout is not None
    json.loads(process.stdout.readline())
    before = timed("a backup under load", stack.backup)
    assert process.wait(300) == 0
    process.communicate()
    late = stack.exec("gateway", "interpose", "keys", "create", "--user", "bob").strip().splitlines()[-1]
    begun = time.monotonic()
    stack.restore(before)
    until("a model", lambda: fetch("/readyz", root)[0] == 200, 600)
    assert (fetch("/v1/me", root, key)[0], fetch("/v1/me", root, late)[0]) == (200, 401)
    assert stack.asked(key, "load", "3")["ended"] == {"completed": 3}
    say(f"{before.stat().st_size / 1e6:.1f} MB restored: keys are those of its time, jobs run",
        time.monotonic() - begun)  # fmt: skip
