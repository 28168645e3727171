"""Processes that each load a part of a model, under a limit on their memory; a line of JSON for each.

Arguments: a model's folder, how many parts, bytes beyond its part that a process may take.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from interpose.errors import InterposeError
from interpose.runtime.blocklists import main_list
from interpose.runtime.partial_loading import Keep, inside, load_part, outline
from interpose.runtime.sources import Source

FOLDER, PARTS, BEYOND = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def told(key: str) -> int:
    """Bytes, as the kernel counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def attempt(keep: Keep, part_bytes: int) -> dict[str, object]:
    limit = told("VmSize") + part_bytes + BEYOND
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = told("VmRSS")
    try:
        model = load_part(FOLDER, keep, device="cpu")
        touched = sum(float(param.sum()) for param in model.parameters() if not param.is_meta)
    except (MemoryError, InterposeError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    real = sum(param.nbytes for param in model.parameters() if not param.is_meta)
    return {"part": part_bytes, "real": real, "peak": told("VmHWM") - before, "finite": touched == touched}


def forked(keep: Keep, part_bytes: int) -> None:
    child = os.fork()
    if not child:
        print(json.dumps(attempt(keep, part_bytes)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)


def main() -> None:
    model = outline(Source.of(FOLDER).config())
    its = main_list(model)
    assert its is not None
    each = len(its) // PARTS
    for part in range(PARTS):
        keep = inside(its.blocks[part * each : (part + 1) * each])
        forked(keep, sum(param.nbytes for name, param in model.named_parameters() if keep(name)))
    # The whole, with no more room than a part has.
    forked(lambda name: True, sum(param.nbytes for param in model.parameters()) // PARTS)


main()
