"""How much memory is left where a model computes."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import nn

_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""What a container may have, what it has, and how much of that are files it could let go of; by both cgroups."""


def free_bytes(model: nn.Module) -> int:
    """Of the devices a model lies on, what the fullest has left."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    cards = [device for device in devices if device.type == "cuda"]
    return min(map(_on_card, cards)) if cards else _on_host()


def _on_card(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    # This process may have been given a part of the card, whatever else is free on it now.
    share = int(total * torch.cuda.get_per_process_memory_fraction(device)) - used
    return min(free + torch.cuda.memory_reserved(device) - used, share)


def _on_host() -> int:
    return min([int(psutil.virtual_memory().available), *map(_contained, *zip(*_LIMITS, strict=True))])


def _contained(limit: str, current: str, stat: str) -> int:
    """What is left of a container's memory; without bound where there is none."""
    try:
        text = Path(limit).read_text().strip()
        if text == "max":
            return 1 << 62
        files = [
            line.split()[1] for line in Path(stat).read_text().splitlines() if line.startswith("inactive_file ")
        ]
        return max(int(text) - int(Path(current).read_text()) + sum(map(int, files)), 0)
    except (OSError, ValueError, IndexError):
        return 1 << 62
