"""Other libraries' spellings in a block: what stands for them, and what to write where nothing does."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..errors import BadArgument, UnknownOp

if TYPE_CHECKING:
    from .tracer import Tracer

_STEPS = "for step in t.iter[...]:"

ADVICE: Mapping[str, str] = {
    "iter": f"an edit holds at every step already; steps are chosen in a generation, {_STEPS}",
    "local": "a block is recorded on this machine anyway; leave it out",
    "output": "write t.result",
    "vis": "write print(t.graph)",
    "push": "names in a block are ordinary names; leave it out",
    "pull": "names in a block are ordinary names; leave it out",
}


def unknown(what: str, name: str) -> NoReturn:
    """Raise UnknownOp, which is an AttributeError, with what to write instead where that is known."""
    raise UnknownOp(f"{what} has no {name!r}" + (f": {ADVICE[name]}" if name in ADVICE else ""))


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Token ids and their mask, [rows, longest], padded on the left with 0; torch's tensors where torch is."""
    make: Callable[[Any], Any] = np.asarray
    if importlib.util.find_spec("torch"):
        from .torch_face import whole as make
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": make(ids), "attention_mask": make(mask)}


class Once:
    """What `session.iter(...)` gives: a Python loop runs over it, a `with` can't."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __enter__(self) -> NoReturn:
        raise BadArgument(
            "the body of a with runs once; write for item in session.iter(...):, or over the list itself"
        )

    def __exit__(self, *error: object) -> None:
        return None


class Backend:
    """A block's job under the names nnsight has for it: `backend.job_id`, `backend.job_status`, `backend()`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @property
    def job_id(self) -> str:
        return self._tracer.job.id  # type: ignore[no-any-return]

    @property
    def job_status(self) -> Any:
        return self._tracer.job.status

    def __call__(self) -> dict[str, Any] | None:
        """The saved values by the names their lines give them, or None while the job runs."""
        job = self._tracer.job
        if not job.status.terminal:
            return None
        names = self._tracer.graph.names
        return {names.get(node, str(node)): value for node, value in job.result().items()}
