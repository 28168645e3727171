"""Write the tables of docs/sizing.md anew, from the configs in tests/published.py: `python scripts/sizing.py`."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from interpose.errors import ConfigError  # noqa: E402
from interpose_server.models.devices import Devices  # noqa: E402
from interpose_server.models.placement import Plan, plan  # noqa: E402
from interpose_server.models.planning import figures  # noqa: E402
from interpose_server.models.report import number, show  # noqa: E402
from interpose_server.models.sizes import Sizes, widest  # noqa: E402
from interpose_server.models.spec import ModelSpec, Placement  # noqa: E402
from published import CONFIGS, written  # noqa: E402
from rich.console import Console  # noqa: E402

PAGE = ROOT / "docs" / "sizing.md"
CARDS = {"24 GB": "16x24GB", "80 GB": "+".join(["8x80GB"] * 4), "141 GB": "+".join(["8x141GB"] * 2)}
"""What a column is called -> the devices there are."""

SHOWN = ("Llama-3.1-70B", "4x80GB")
GIB, KIB = 1 << 30, 1 << 10


def table() -> str:
    heads = ("model", "parameters", "kept as", "weights, GiB", "a token's KV", "its activations", *CARDS)
    lines = [_line(_sizes(name)) for name in CONFIGS]
    return "\n".join(("| " + " | ".join(cells) + " |") for cells in (heads, ("---",) * len(heads), *lines))


def example() -> str:
    """What the command prints for one of them."""
    name, devices = SHOWN
    out = io.StringIO()
    show(plan(_sizes(name), Devices.parse(devices)), Console(file=out, width=120))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def filled(text: str) -> str:
    """The page with its tables as they are today."""
    for mark, content in (("table", table()), ("example", f"```text\n{example()}\n```")):
        start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        text = re.sub(f"{start}.*{end}", lambda _, new=f"{start}\n{content}\n{end}": new, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def _sizes(name: str) -> Sizes:
    return figures(ModelSpec(name=name, source=str(written(name))))


def _line(sizes: Sizes) -> tuple[str, ...]:
    context = 2048 if sizes.positions is None else min(2048, sizes.positions)
    kept = f"{sizes.quantization}, {sizes.dtype}" if sizes.quantization else sizes.dtype
    return (
        sizes.model,
        number(sizes.parameters),
        kept,
        f"{sizes.weights / GIB:,.1f}",
        f"{sizes.cache(1, context) / context / KIB:,.0f} KiB",
        f"{widest([sizes.outside, *sizes.blocks]) / KIB:,.0f} KiB",
        *(_fits(sizes, Devices.parse(devices)) for devices in CARDS.values()),
    )


def _fits(sizes: Sizes, devices: Devices) -> str:
    try:
        found = plan(sizes, devices)
    except ConfigError:
        return "-"
    return _told(found)


def _told(found: Plan) -> str:
    if found.placement is Placement.DEVICE:
        return "1" if found.share == 1 else f"{found.share:g} of 1"
    return f"{len(found.shards)}{', ranges' if found.placement is Placement.BLOCKS else ''}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
