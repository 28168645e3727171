"""`make bench`: measures for ten minutes, prints one table, and keeps it in results/. `--quick` takes about two.

Nothing here passes or fails: figures stand beside what the machine can do without us, taken in the same minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

# Before torch and the client are imported; a developer's own server must not be measured.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
# As the server's workers: on a machine that others use, threads that spin while they wait take what they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for _name in ("INTERPOSE_HOST", "INTERPOSE_API_KEY", "NDIF_HOST", "NDIF_API_KEY"):
    os.environ.pop(_name, None)

import early  # noqa: E402
import generation  # noqa: E402
import lab  # noqa: E402
import latency  # noqa: E402
import local  # noqa: E402
import memory  # noqa: E402
import startup  # noqa: E402
import steering  # noqa: E402
import storage  # noqa: E402
import sweep  # noqa: E402
import throughput  # noqa: E402
import torch  # noqa: E402
import transfer  # noqa: E402
from interpose import CONFIG  # noqa: E402
from table import Row, markdown  # noqa: E402
from timing import FULL, QUICK  # noqa: E402

PARTS = {
    "local": local,
    "memory": memory,
    "latency": latency,
    "transfer": transfer,
    "storage": storage,
    "startup": startup,
    "early": early,
    "steering": steering,
    "sweep": sweep,
    "throughput": throughput,
    "generation": generation,
}
RESULTS = Path(__file__).with_name("results")

SCALE = """\
For scale, NDIF 0.1.2 with its stock client on the same kind of machine and a 4-layer tiny GPT-2: p50 106-114 ms,
10 requests/s from 8 clients, a 64 MB result at 35 MB/s (62 uncompressed), 58 s from start to first result; its raw
protocol replayed: p50 42 ms, 28 requests/s."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Interpose beside what it stands on.")
    parser.add_argument("--quick", action="store_true", help="two minutes, rougher figures; nothing is kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts; nothing is kept")
    wanted = parser.parse_args()
    CONFIG.progress = False
    # However it is ended, the servers it started end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    began, load = time.perf_counter(), os.getloadavg()[0]
    rows: list[Row] = []
    try:
        for name in wanted.only:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            rows += PARTS[name].measure(QUICK if wanted.quick else FULL)
    finally:
        lab.close()
    text = "\n\n".join([about(began, load, quick=wanted.quick), markdown(rows), SCALE]) + "\n"
    print(text, end="")
    if wanted.only == list(PARTS) and not wanted.quick:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}.md"
        file.write_text(text)
        print(f"kept in {file}", file=sys.stderr)


def about(began: float, load: float, *, quick: bool) -> str:
    """What the figures were taken on. Server, clients and what they stand beside share the machine."""
    cores = len(os.sched_getaffinity(0))
    after = os.getloadavg()[0]
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {cores} cores shared by server, clients and whatever else runs "
        f"(load {load:.1f} before, {after:.1f} after), {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {'quick, ' * quick}{time.perf_counter() - began:.0f} s. Medians of runs in "
        f"turns; relations are medians of one turn's."
    )


if __name__ == "__main__":
    main()
