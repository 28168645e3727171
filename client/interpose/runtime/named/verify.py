"""Proof on numbers: every named point read on a real run, its identities held up, and written to see what moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import InterposeError, first_line
from ...graph.named import Named
from ...graph.values import Ref
from ..pieces import Piece
from .checks import Identity, unmasked
from .sheet import Name, Sheet

CHUNK = 8
"""Blocks read in one forward: what a run keeps stays small beside the model."""

ANCHORS = frozenset({"resid_pre", "resid_post", "logits", "embed"})
"""What modules take and return, whatever an identity says: these aren't doubted when one fails."""

_WEIGHTS = frozenset({"scores", "expert_weights"})

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_MOVED = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@dataclass
class Trial:
    """The points of one model while they are tried.

    Attributes:
        engine: runs graphs on the model.
        sample: one row to try them on.
        points: all of them by owner and name; those that fail leave.
        identities: what must hold between them.
        dtype: of the model's weights, which decides how exactly.
        kinds: blocks in groups of one structure, whose writes are alike.
        experts: how many a router chooses from.
        adapter: what its runs choose.
        apart: whether these are some blocks of a model's: then what follows the last one isn't asked after a write
            in a block, as in a whole model it isn't either, where the first of a kind is written.
        failed: why points left.
        written: of these, those that left as a write did nothing, or something wrong, by the block it was in;
            each of its kind has lost them.
    """

    engine: Any
    sample: Piece
    points: dict[Name, Named]
    identities: Sequence[Identity]
    dtype: torch.dtype
    kinds: Sequence[Sequence[str]]
    experts: int = 2
    adapter: str | None = None
    apart: bool = False
    failed: dict[Name, str] = field(default_factory=dict)
    written: dict[Name, str] = field(default_factory=dict)

    def run(self) -> None:
        owners = list(dict.fromkeys(owner for owner, _ in self.points))
        proved = {name for name in self.points if name[1] in ANCHORS}
        for chunk in (owners[start : start + CHUNK] for start in range(0, len(owners), CHUNK)):
            proved |= self._read(set(chunk))
        for name in set(self.points) - proved:
            self._refuse(name, "nothing it could be checked against exists here")
        for kind in self.kinds:
            self._write(kind)

    # -- reading -----------------------------------------------------------------------------------------------

    def _read(self, owners: set[str]) -> set[Name]:
        """Read all that identities of some owners concern; returns the names that took part in one that holds."""
        identities = [identity for identity in self.identities if identity.output[0] in owners]
        wanted = {name for identity in identities for name in (identity.output, *identity.inputs)}
        wanted |= {name for name in self.points if name[0] in owners}
        values = self._captured(wanted)
        for name, value in values.items():
            reason = lifeless(value, masked=name[1] == "scores")
            if reason:
                self._refuse(name, reason)
        proved: set[Name] = set()
        for identity in identities:
            names = (identity.output, *identity.inputs)
            if not all(name in values for name in names):
                continue
            reason = self._fails(identity, values)
            proved |= set() if reason else set(names)
            for name in names if reason else ():
                if name[1] not in ANCHORS:
                    self._refuse(name, reason)
        return proved

    def _captured(self, wanted: set[Name]) -> Mapping[Name, Tensor]:
        while True:
            sheet = Sheet(self.sample, self.adapter)
            invoke = sheet.invoke()
            for name in (name for name in self.points if name in wanted):
                sheet.keep(invoke, name, sheet.read(invoke, name, self.points[name]))
            try:
                return {name: value for (_, name), value in sheet.run(self.engine).items()}
            except InterposeError as error:
                self._blame(sheet, error)

    def _fails(self, identity: Identity, values: Mapping[Name, Tensor]) -> str:
        found = identity.compared(values[identity.output])
        given = {name[1]: value for name, value in values.items() if name[0] in ("", identity.output[0])}
        given |= {name[1]: values[name] for name in identity.inputs}
        try:
            ways = [identity.compared(way) for way in identity.expected(given)]
        except Exception as error:  # noqa: BLE001 - a family's entry may be wrong in any way; then it isn't offered
            return f"it can't be checked that {identity.says}: {first_line(error, 120)}"
        if any(close(found, way, _TOLERANCE.get(self.dtype, 5e-2)) for way in ways):
            return ""
        return f"on numbers it doesn't hold here that {identity.says}"

    # -- writing -----------------------------------------------------------------------------------------------

    def _write(self, kind: Sequence[str]) -> None:
        """Write each point of a kind of block, in a row of its own of one forward."""
        owner = kind[0]
        while True:
            names = [name for name in self.points if name[0] == owner]
            sheet, plan = self._written(names)
            if not plan:
                return
            try:
                kept = sheet.run(self.engine)
                break
            except InterposeError as error:
                self._blame(sheet, error, kind)
        clean = {name: value for (invoke, name), value in kept.items() if invoke == 0}
        for invoke, name in plan.items():
            values = {at: value for (row, at), value in kept.items() if row == invoke}
            reason = self._ineffective(name, values, clean)
            if reason:
                self._refuse_all(kind, name[1], reason)

    def _written(self, names: Sequence[Name]) -> tuple[Sheet, dict[int, Name]]:
        """A sheet whose first row is untouched, and each other writes one point: row -> point."""
        sheet = Sheet(self.sample, self.adapter)
        sheet.invoke()
        plan = {sheet.invoke(): name for name in names}
        needed: set[Name] = {self._end}
        for invoke, name in plan.items():
            old = sheet.read(invoke, name, self.points[name])
            new = sheet.op(invoke, *self._other(name, old))
            sheet.write(invoke, name, self.points[name], new, old)
            keeps = {at for identity in self._from(name) for at in (identity.output, *identity.inputs)}
            for at in (at for at in self.points if at in (keeps | {self._end}) and at != name):
                sheet.keep(invoke, at, sheet.read(invoke, at, self.points[at]))
            # What is computed keeps its old value for those who ask again: the write goes on from there.
            again = new if self.points[name].steps else sheet.read(invoke, name, self.points[name])
            sheet.keep(invoke, name, again)
            needed |= keeps
        for at in (at for at in self.points if at in needed):
            sheet.keep(0, at, sheet.read(0, at, self.points[at]))
        return sheet, plan

    def _other(self, name: Name, old: int) -> tuple[Any, ...]:
        """The op that makes another value to write."""
        if name[1] == "router_logits":
            return "mul", Ref(old), -1.5  # another order, and other distances
        if name[1] == "expert_ids":
            return "sub", self.experts - 1, Ref(old)
        # What is normalised later doesn't feel a factor, and what is masked must stay where it is.
        return ("mul", Ref(old), 2.0) if name[1] in _WEIGHTS else ("flip", Ref(old), (-1,))

    def _ineffective(self, name: Name, values: Mapping[Name, Tensor], clean: Mapping[Name, Tensor]) -> str:
        moved = {at for at in values if at != name and self._moved(at[1], values[at], clean[at])}
        tried = set()
        for identity in self._from(name):
            if not all(at in values for at in (identity.output, *identity.inputs)):
                continue
            reason = self._fails(identity, values)
            if reason:
                return f"after a write, {reason}"
            tried.add(identity.output)
        # One of several may stay, as a single expert's normalised weight does.
        if tried and not tried & moved:
            return f"a write doesn't move {' or '.join(sorted(at for _, at in tried))}"
        after = name[1] == "final_norm" and self._end[1] == "resid_post"  # of a model without a head
        if name != self._end and self._end not in moved and not after:
            return "a write doesn't move the model's output"
        return ""

    def _from(self, name: Name) -> Iterator[Identity]:
        return (
            identity
            for identity in self.identities
            if name in identity.inputs
            and identity.output in self.points
            and not (self.apart and name[0] and not identity.output[0])
        )

    @property
    def _end(self) -> Name:
        """The last value of the model's forward."""
        if ("", "logits") in self.points:
            return "", "logits"
        return next(name for name in reversed(self.points) if name[1] == "resid_post")

    def _moved(self, name: str, value: Tensor, before: Tensor) -> bool:
        if not value.is_floating_point():
            return not torch.equal(value, before)
        one, other = (unmasked(side) if name == "scores" else side.double() for side in (value, before))
        return float((one - other).abs().max()) > _MOVED.get(self.dtype, 4e-3) * float(other.abs().mean())

    # -- refusing ----------------------------------------------------------------------------------------------

    def _blame(self, sheet: Sheet, error: InterposeError, kind: Sequence[str] = ()) -> None:
        """Let the point go whose node failed; without one, nothing can be tried and the error stands."""
        name = sheet.cause.get(error.node) if error.node is not None else None
        if name is None or name not in self.points:
            raise error
        reason = f"it can't be used: {error.message}"
        if name[0] in kind:
            self._refuse_all(kind, name[1], reason)
        else:
            self._refuse(name, reason)

    def _refuse_all(self, kind: Sequence[str], name: str, reason: str) -> None:
        """What came of writing the first of a kind is so for all of it."""
        self.written[kind[0], name] = reason
        for owner in kind:
            self._refuse((owner, name), reason)

    def _refuse(self, name: Name, reason: str) -> None:
        if self.points.pop(name, None) is not None:
            self.failed[name] = reason


def lifeless(value: Tensor, *, masked: bool = False) -> str:
    """Why a captured value proves nothing, or ""."""
    if not masked and not torch.isfinite(value).all():
        return "it isn't finite on a short run"
    if not value.any():
        return "it is all zero on a short run"
    return ""


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two values agree in shape, in every element beside the largest, and in size."""
    if found.shape != expected.shape:
        return False
    one, other = found.double(), expected.double()
    if not torch.isfinite(one).all() or not torch.isfinite(other).all():
        return False
    largest, size = float(other.abs().max()), float(other.norm())
    apart = float((one - other).abs().max())
    return largest > 0 and apart <= tolerance * largest and abs(float(one.norm()) - size) <= tolerance * size
