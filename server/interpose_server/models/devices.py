"""The devices there are, as an operator states them: "8x80GB", "2x24GB,1x48GB", "4x80GB+4x80GB" (two machines)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from interpose.errors import ConfigError

GIB = 1 << 30

CONTEXT = GIB
"""Of every device, what a process with its libraries takes before it holds anything."""

LOST = 0.03
"""Of every device, the part that allocators lose between what they hold."""

_GROUP = re.compile(
    r"\s*(?:(\d{1,4})\s*[x×*]\s*)?(\d{1,9}(?:\.\d+)?)\s*(GB|GiB|G|TB|TiB|T|MB|MiB|M)\s*", re.IGNORECASE
)
_UNITS = {"m": 1 << 20, "g": GIB, "t": 1 << 40}


@dataclass(frozen=True)
class Device:
    """Attributes:
    node, index: which machine, and which device of it.
    memory: bytes.
    """

    node: int
    index: int
    memory: int

    @property
    def usable(self) -> int:
        return max(int(self.memory * (1 - LOST)) - CONTEXT, 0)

    @property
    def label(self) -> str:
        return f"{self.node}:{self.index}"


@dataclass(frozen=True)
class Devices:
    """Attributes:
    nodes: the devices of every machine.
    """

    nodes: tuple[tuple[Device, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Devices:
        """Groups are joined by commas on one machine, and machines by plus signs.

        A card sold with 80 GB has about 80 GiB, so that is what the letters mean. Raises ConfigError.
        """
        return cls.of([_node(node) for node in text.split("+")])

    @classmethod
    def of(cls, nodes: list[list[int]]) -> Devices:
        """From bytes."""
        return cls(
            tuple(
                tuple(Device(at, index, size) for index, size in enumerate(node)) for at, node in enumerate(nodes)
            )
        )

    @property
    def every(self) -> tuple[Device, ...]:
        return tuple(device for node in self.nodes for device in node)

    def __str__(self) -> str:
        return "+".join(",".join(_groups(node)) for node in self.nodes)


def _node(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        match = _GROUP.fullmatch(part)
        if match is None or int(match[1] or 1) == 0:
            raise ConfigError(
                f"devices {part.strip()!r} aren't understood; state them as 8x80GB, as 2x24GB,1x48GB or, on two "
                "machines, as 4x80GB+4x80GB"
            )
        found += [int(float(match[2]) * _UNITS[match[3][0].lower()])] * int(match[1] or 1)
    return found


def _groups(node: tuple[Device, ...]) -> list[str]:
    sizes = list(dict.fromkeys(device.memory for device in node))
    counts = {size: sum(device.memory == size for device in node) for size in sizes}
    return [f"{count}x{size / GIB:g}GB" for size, count in counts.items()]
