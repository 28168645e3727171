"""Random little programs over the values at three hook points: run on real tensors, and recorded.

A program is a list of steps for each hook point, each a kind and numbers that choose among the names made so far.
What a step does is written once, for tensors and deferred values alike. The run on real tensors, inside hooks
written by hand, leaves out the steps torch refuses; the others are then recorded as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Step = tuple[str, int, int, int]

VIEWS: list[Callable[[Any], Any]] = [
    *(lambda x: x[0], lambda x: x[-1], lambda x: x[:, -1], lambda x: x[..., 0], lambda x: x[None]),
    *(
        lambda x: x[:, 1:],
        lambda x: x[..., ::2],
        lambda x: x[:, 0, :3],
        lambda x: x[..., None, 1],
        lambda x: x[...],
    ),
    *(
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(-1, -2),
        lambda x: x.movedim(-1, -2),
        lambda x: torch.swapaxes(x, 0, -1),
    ),
    *(lambda x: x.view(-1), lambda x: x.reshape(-1), lambda x: torch.flatten(x, 0, 1), lambda x: x.contiguous()),
    *(lambda x: x.unflatten(-1, (2, -1)), lambda x: x.view(*x.shape[:-1], 2, -1), lambda x: x.unfold(-1, 2, 2)),
    *(
        lambda x: x.chunk(2, -1)[1],
        lambda x: torch.split(x, 1)[0],
        lambda x: x.unbind(0)[-1],
        lambda x: next(iter(x)),
    ),
    *(lambda x: x.squeeze(0), lambda x: x.unsqueeze(1), lambda x: x.permute(*reversed(range(x.ndim)))),
    *(lambda x: x.select(-1, 1), lambda x: x.narrow(-1, 1, 2), lambda x: x.diagonal(0, -2, -1)),
    *(lambda x: x.movedim(0, -1), lambda x: x.detach(), lambda x: x.float(), lambda x: x.to(torch.float32)),
    *(lambda x: x.expand(3, *x.shape), lambda x: x[torch.tensor(0)]),
]
"""What shares memory with `x`, or does where torch can."""

COMPUTED: list[Callable[[Any, Any], Any]] = [
    *(
        lambda x, y: x * 2,
        lambda x, y: x + y,
        lambda x, y: 1.5 - x,
        lambda x, y: torch.tanh(x),
        lambda x, y: x @ x.transpose(-1, -2),
    ),
    *(lambda x, y: x.mean(-1, keepdim=True), lambda x, y: torch.where(x > 0, x, y), lambda x, y: x.clone()),
    *(lambda x, y: torch.cat([x, y], -1), lambda x, y: x.topk(2).values, lambda x, y: x.double(), lambda x, y: -x),
    *(
        lambda x, y: x[:, [0, 1]],
        lambda x, y: x[torch.tensor([1, 0])],
        lambda x, y: x.gather(-1, x.argsort(-1)),
    ),
    *(lambda x, y: x[:, [True, False, True, False]], lambda x, y: x.softmax(0)),
]
"""New values, which share nothing."""


def _set(index: Any, value: Callable[[Any, Any], Any]) -> Callable[[Any, Any], None]:
    def write(x: Any, y: Any) -> None:
        x[index] = value(x, y)

    return write


def _masked(x: Any, y: Any) -> None:
    x[x > 0] = 0.5


def _masked_scaled(x: Any, y: Any) -> None:
    x[x < 0] *= -1


def _augmented(x: Any, y: Any) -> None:
    x += y


def _row_augmented(x: Any, y: Any) -> None:
    x[0] += 1


def _part_augmented(x: Any, y: Any) -> None:
    x[..., -1] -= y[..., 0]


def _listed(x: Any, y: Any) -> None:
    x[[0, -1]] = 2.0


WRITES: list[Callable[[Any, Any], Any]] = [
    *(_set(..., lambda x, y: 1.5), _set(0, lambda x, y: 0), _set((slice(None), -1), lambda x, y: x[:, 0])),
    *(_set(slice(None), lambda x, y: y), _set((..., 0), lambda x, y: y.mean()), _set(-1, lambda x, y: y[0])),
    *(_masked, _masked_scaled, _augmented, _row_augmented, _part_augmented, _listed),
    *(
        lambda x, y: x.mul_(2),
        lambda x, y: x.zero_(),
        lambda x, y: x.clamp_(min=0),
        lambda x, y: x.add_(y, alpha=2),
    ),
    *(lambda x, y: x.fill_(0.25), lambda x, y: x.copy_(y), lambda x, y: x.neg_(), lambda x, y: torch.relu_(x)),
    *(lambda x, y: x.masked_fill_(x > 0.5, 0), lambda x, y: x.sub_(x.mean()), lambda x, y: x.tanh_().add_(1)),
]
"""What changes `x`, and through it everything that shares its memory."""

KINDS = ("read", "view", "view", "compute", "write", "write", "replace", "replace by a copy", "save")


def program(seed: int, length: int) -> list[Step]:
    rng = random.Random(seed)
    return [("read", 0, 0, 0)] + [
        (rng.choice(KINDS), *(rng.randrange(10**6) for _ in range(3))) for _ in range(length)
    ]


@dataclass
class Names:
    """The names a program has given so far, and what it saved."""

    values: list[Any] = field(default_factory=list)
    saved: list[Any] = field(default_factory=list)


def take(step: Step, names: Names, read: Callable[[], Any], replace: Callable[[Any], None], save: Any) -> None:
    """One step, on whatever the names are."""
    kind, which, other, one = step
    if kind == "read":
        names.values.append(read())
        return
    x, y = names.values[which % len(names.values)], names.values[other % len(names.values)]
    match kind:
        case "view":
            names.values.append(VIEWS[one % len(VIEWS)](x))
        case "compute":
            names.values.append(COMPUTED[one % len(COMPUTED)](x, y))
        case "write":
            WRITES[one % len(WRITES)](x, y)
        case "replace":
            replace(x)
        case "replace by a copy":
            replace(x.clone())
        case "save":
            names.saved.append(save(x))


@dataclass
class Eager:
    """Runs programs on real tensors, one a hook point, and notes the steps torch took."""

    names: Names = field(default_factory=Names)
    taken: list[list[Step]] = field(default_factory=list)
    current: Tensor = field(default_factory=lambda: torch.empty(0))
    gone: list[Tensor] = field(default_factory=list)
    """What the points held before: names of it may be read, and no longer written."""
    views: set[int] = field(default_factory=set)

    def run(self, steps: Sequence[Step], value: Tensor) -> Tensor:
        self.taken.append([])
        self.gone.append(self.current)
        self.current = value.clone()
        for step in steps:
            if self._refused(step):
                continue
            before = len(self.names.values)
            try:
                take(step, self.names, lambda: self.current, self._replace, Tensor.clone)
            except (RuntimeError, IndexError, TypeError, ValueError):
                continue
            if step[0] == "view" and not self._is_view(step, before):
                self.names.values.pop()
                continue
            if step[0] == "view":
                self.views.add(before)
            self.taken[-1].append(step)
        self.gone.append(self.current)
        return self.current

    def _replace(self, value: Tensor) -> None:
        if value.shape != self.current.shape:
            raise ValueError("another shape")
        if value is not self.current:
            self.gone.append(self.current)
            self.current = value.to(self.current.dtype, copy=True)

    def _refused(self, step: Step) -> bool:
        x = self.names.values[step[1] % len(self.names.values)] if self.names.values else None
        if step[0] == "write":
            return any(_shares(x, old) for old in self.gone) or not _plain(x)
        # Strides change the last bits of what the model computes, and a view of parts is copied differently.
        if step[0] == "replace" and x is self.current:
            return step[1] % len(self.names.values) in self.views  # x.float(): torch gives x itself
        return step[0] == "replace" and not x.is_contiguous()

    def _is_view(self, step: Step, before: int) -> bool:
        # Whether reshape copies depends on strides; what is recorded is told so only when it runs.
        made = self.names.values[-1]
        return _shares(made, self.names.values[step[1] % before]) and made.numel() > 0


def _shares(one: Any, other: Tensor) -> bool:
    return one is not None and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _plain(value: Any) -> bool:
    """Whether no element shows twice: torch refuses some writes to such views only halfway."""
    return all(stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1)
