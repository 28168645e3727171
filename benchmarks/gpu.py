"""On a GPU: a random model of an 8B Llama's shape in bfloat16, beside the bare forward and the links.

Needs this tree, torch and transformers, nothing installed:

    python benchmarks/gpu.py                      # about three minutes on one H100
    python benchmarks/gpu.py --parts hooks link   # some parts
    python benchmarks/gpu.py --device cpu --dtype float32 --layers 2 --width 64 --heads 4 --kv-heads 2 --mlp 112 \\
        --vocab 400 --tokens 16 --jobs 4 --repeat 2      # a rehearsal without a GPU

`serve` runs the real server, where its packages can be imported; it writes the model to a folder of its own first.
Each row is printed as soon as it is known, and the whole as a table at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("client", "server", "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"INTERPOSE_PROGRESS": "0", "OMP_WAIT_POLICY": "PASSIVE"}

import torch  # noqa: E402
from gpu_compute import batch, hooks  # noqa: E402
from gpu_model import Bench  # noqa: E402
from gpu_transfer import serve, to_link  # noqa: E402
from table import Row, markdown  # noqa: E402

Part = Callable[[Bench], Iterator[Row]]
PARTS: dict[str, Part] = {"hooks": hooks, "batch": batch, "link": to_link, "serve": serve}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    wanted = parsed(arguments)
    bench = Bench(wanted)
    rows: list[Row] = []
    for name in wanted.parts:
        for row in PARTS[name](bench):
            print(f"{name}: {row.what}: {row.ours} | {row.beside} | {row.relation} | {row.note}", flush=True)
            rows.append(row)
    print(f"\n{about(wanted)}\n\n{markdown(rows)}")
    return rows


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Interpose on a GPU beside what the GPU does without it.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    sizes = {"layers": 32, "width": 4096, "heads": 32, "kv-heads": 8, "mlp": 14_336, "vocab": 128_256}
    for name, size in (sizes | {"tokens": 512, "jobs": 32, "repeat": 20}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    return parser.parse_args(arguments)


def about(wanted: argparse.Namespace) -> str:
    card = torch.cuda.get_device_name() if wanted.device.startswith("cuda") else wanted.device
    return (
        f"{card}, torch {torch.__version__}, {wanted.layers} layers of {wanted.width} in {wanted.dtype}, random "
        f"weights. Medians of {wanted.repeat} runs in turns; relations are medians of one turn's."
    )


if __name__ == "__main__":
    main()
