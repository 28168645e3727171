"""Cluster mode: `python benchmarks/cluster.py [start] [cost] [faults] [--quick]`, a table each.

start: from `deploy up` to the first result. cost: of a job, beside `interpose serve` of the same model on as many
threads. faults: what dies under load on a cluster of two nodes, how long it takes until all copies run again, and
what became of the jobs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
for _name in ("INTERPOSE_HOST", "INTERPOSE_API_KEY"):
    os.environ.pop(_name, None)

import lab as benches  # noqa: E402
from cluster_lab import ClusterLab, Load, Tally, cluster_lab  # noqa: E402
from interpose import CONFIG, LanguageModel  # noqa: E402
from serving import Served, deploy, serve  # noqa: E402
from table import Row, markdown, ms  # noqa: E402
from timing import added, interleaved, ratio, seconds  # noqa: E402

THREADS = {"INTERPOSE_SERVER_WORKER_THREADS": "1", "OMP_NUM_THREADS": "1"}
SAME = THREADS | {"INTERPOSE_SERVER_VALKEY_FSYNC": "everysec"}
"""For a server on Ray and one without, whose brokers sync their log at different times by default."""


def model(name: str, folder: Path, copies: int = 1, **more: Any) -> dict[str, Any]:
    return {"name": name, "source": str(folder), "replicas": {"min": copies, "max": copies}} | more


# -- from nothing to a result -----------------------------------------------------------------------------------


def start(quick: bool) -> Iterator[Row]:
    folder = benches.tiny()
    works = partial(first_deployed, folder), partial(first_served, folder)
    ours, beside = interleaved(1 if quick else 3, *works, warm=0)
    yield Row(
        "start to first result", f"{median(ours):.1f} s", f"interpose serve {median(beside):.1f} s",
        f"{ratio(ours, beside):.1f}x", "tiny GPT-2; Ray, Serve, Valkey and gateway started, too",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="b-") as scratch, cluster_lab(Path(scratch), 2) as there:
        yield Row(
            "the same on a cluster that runs",
            f"{first_joined(there, folder):.1f} s",
            "",
            "",
            "Serve's start included",
        )


def first_deployed(folder: Path) -> float:
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="b-") as scratch,
        deploy(Path(scratch, "c.yaml"), model("tiny", folder)) as lab,
    ):
        trace(client("tiny", lab))
        return time.perf_counter() - began


def first_served(folder: Path) -> float:
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="b-") as scratch,
        serve(f"tiny={folder}", data_dir=Path(scratch, "d")) as lab,
    ):
        trace(client("tiny", lab))
        return time.perf_counter() - began


def first_joined(lab: ClusterLab, folder: Path) -> float:
    began = time.perf_counter()
    lab.deploy(model("tiny", folder))
    trace(LanguageModel("tiny", host=lab.host, api_key=lab.key))
    return time.perf_counter() - began


# -- what a job costs -------------------------------------------------------------------------------------------


def cost(quick: bool) -> Iterator[Row]:
    models = {"tiny": benches.tiny(), "smol": benches.smol()}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="b-")))
        specs = [model(name, folder) for name, folder in models.items()]
        ours = stack.enter_context(deploy(scratch / "c.yaml", *specs, env=SAME))
        names = [f"{name}={folder}" for name, folder in models.items()]
        beside = stack.enter_context(serve(*names, data_dir=scratch / "d", env=SAME))
        for name, text in (("tiny", "tiny GPT-2"), ("smol", "SmolLM2-135M")):
            pair = [partial(seconds, partial(trace, client(name, lab))) for lab in (ours, beside)]
            rounds = (40 if quick else 300) if name == "tiny" else (10 if quick else 60)
            found, other = interleaved(rounds, *pair, warm=5)
            yield Row(
                f"one job, {text}", ms(median(found)), f"embedded mode {ms(median(other))}",
                f"{ratio(found, other):.2f}x", f"{ms(added(found, other))} more, by pairs; a trace, one save",
            )  # fmt: skip


def trace(model: LanguageModel) -> None:
    with model.trace(benches.PROMPT, remote=True):
        model.output[0, -1].save()


def client(name: str, lab: Served) -> LanguageModel:
    return LanguageModel(name, host=lab.host, api_key=lab.key)


# -- what dies --------------------------------------------------------------------------------------------------

REPLICAS = "ServeReplica:interpose-org-tiny"
COPIES = 2
KILLING = ("a node with a copy",)
"""Cases that hit jobs for sure."""
PATIENCE_S = 200.0


def faults(quick: bool, only: Sequence[str] = ()) -> Iterator[Row]:
    folder = benches.tiny()
    spec = model("org/tiny", folder, COPIES)
    cases: Mapping[str, Callable[[ClusterLab], float]] = {
        "nothing dies": lambda lab: quiet(),
        "a rolling update": lambda lab: update(lab, spec),
        "Serve's controller": kill_controller,
        "one of two copies": lambda lab: kill_copies(lab, 1),
        "both copies": lambda lab: kill_copies(lab, COPIES),
        "a node with a copy": kill_node,
        "a copy hangs": hang,
    }
    with tempfile.TemporaryDirectory(prefix="b-") as scratch, cluster_lab(Path(scratch), 2, 2) as lab:
        lab.deploy(spec)
        lab.until_copies("org/tiny", COPIES)
        for what, case in cases.items():
            if only and not any(word in what for word in only):
                continue
            with Load(lab, "org/tiny", folder, pause_s=0.1 if quick else 0.03) as load:
                load.until_running()
                took_s = case(lab)
            yield row(what, took_s, checked(what, load.finish(), died=what in KILLING))
        with Load(lab, "org/tiny", folder, pause_s=0.01, most=120) as load:
            while load.submitted < 120:
                time.sleep(0.01)
            took_s = seconds(lambda: lab.interpose("deploy", "down", lab.config(spec), "org/tiny"))
        yield row("deploy down", took_s, checked("deploy down", load.finish()))


def checked(what: str, tally: Tally, *, died: bool = False) -> Tally:
    """Raises AssertionError if a job came to harm, or if the load wasn't one.

    Args:
        died: copies that had jobs died, so that some must have run again.
    """
    print(what, tally, file=sys.stderr, flush=True)
    assert tally.sound and tally.accepted, f"{what}: {tally}"
    assert tally.requeued or not died, f"{what}: it hit no job: {tally}"
    return tally


def quiet() -> float:
    time.sleep(5)
    return 0.0


def kill_copies(lab: ClusterLab, number: int) -> float:
    for replica in lab.ray.processes(REPLICAS)[:number]:
        replica.kill()
    return back(lab, COPIES - number)


def hang(lab: ClusterLab) -> float:
    """It doesn't die, it just does nothing any more: for Serve to notice."""
    lab.ray.processes(REPLICAS)[0].suspend()
    return back(lab, COPIES - 1)


def kill_controller(lab: ClusterLab) -> float:
    (old,) = lab.ray.processes("ServeController")
    began = time.monotonic()
    old.kill()
    until(lambda: any(new.pid != old.pid for new in lab.ray.processes("ServeController")))
    return time.monotonic() - began


def kill_node(lab: ClusterLab) -> float:
    """The node that is left has cores for both copies."""
    _, took_s = lab.lose_node("org/tiny", timeout_s=PATIENCE_S)
    lab.until_copies("org/tiny", COPIES)
    return took_s


def update(lab: ClusterLab, spec: Mapping[str, Any]) -> float:
    before = {replica.pid for replica in lab.ray.processes(REPLICAS)}
    began = time.monotonic()
    lab.deploy({**spec, "settings": {"batch_jobs": 16}})
    until(lambda: not before & {replica.pid for replica in lab.ray.processes(REPLICAS)})
    lab.until_copies("org/tiny", COPIES)
    return time.monotonic() - began


def back(lab: ClusterLab, fallen_to: int) -> float:
    """Seconds until all copies run again, counted from the kill."""
    began = time.monotonic()
    lab.until_copies("org/tiny", fallen_to)
    lab.until_copies("org/tiny", COPIES, PATIENCE_S)
    return time.monotonic() - began


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < ends, "it didn't recover"
        time.sleep(0.05)


def row(what: str, took_s: float, tally: Tally) -> Row:
    ends = (
        f"{tally.accepted} accepted, {tally.completed} ended well, {tally.requeued} requeued, {tally.failed} failed"
    )
    bad = f"{tally.wrong} wrong, {tally.lost} lost, {tally.ended_twice} ended twice, {tally.broken} broken answers"
    return Row(what, f"{took_s:.1f} s", ends, bad, f"slowest job {tally.slowest_s:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["start", "cost", "faults"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="of the faults, those with such a word in their name")
    wanted = parser.parse_args()
    CONFIG.progress = False
    parts = {"start": start, "cost": cost, "faults": partial(faults, only=wanted.only)}
    for part in wanted.parts:
        print(markdown(list(parts[part](wanted.quick))), flush=True)


if __name__ == "__main__":
    main()
