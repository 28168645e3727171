"""How operations are declared: one line of text each, in families that share a shape rule.

A line is `tmf name(input: tensor, dim: int = -1, *size: ints) -> values, indices`; one that ends with a comma goes
on below. The letters say where torch has the operation: t `torch`, m a method of tensors, f `torch.nn.functional`,
l `torch.linalg` (whose ops are named `linalg_...` here); `-` is nowhere. A name declared twice has two signatures,
tried in order.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..values import TensorSpec
from .kinds import Kind, Unknown, kind

Bound: TypeAlias = Mapping[str, Any]
"""Arguments by parameter name."""
Outputs: TypeAlias = tuple[TensorSpec, ...]
Result: TypeAlias = TensorSpec | Outputs | Unknown
Rule: TypeAlias = Callable[[Bound], Result]
Work: TypeAlias = Callable[[Bound, Outputs], tuple[int, int]]
"""(arguments, outputs) -> floating-point operations, bytes held at once beyond arguments and outputs."""

MANY = ("*",)
"""`outputs` of an operation that gives a tuple of tensors without names."""

_PLACES = {"t": "torch.", "m": "torch.Tensor.", "f": "torch.nn.functional.", "l": "torch.linalg."}


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter. `variadic`: positional arguments from here on may be given one by one."""

    name: str
    kind: str
    default: Any
    required: bool
    variadic: bool
    type: Kind = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Signature:
    """One way to call an operation.

    Attributes:
        outputs: as in `Op`, for this way.
        rest: the parameter that takes any further keyword arguments, as a dict.
    """

    params: tuple[Param, ...]
    outputs: tuple[str, ...] | None = None
    rest: Param | None = None

    def __str__(self) -> str:
        shown = []
        for param in self.params:
            default = "" if param.required else f" = {param.default!r}"
            shown.append(f"{'*' * param.variadic}{param.name}: {param.kind}{default}")
        if self.rest is not None:
            shown.append(f"**{self.rest.name}: {self.rest.kind}")
        return f"({', '.join(shown)})"


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        outputs: None: one tensor. Names: a named tuple of tensors. ("*",): a tuple of tensors. Where signatures
            differ, that of the first; `outputs_of` tells for given arguments.
        view: the result may alias the first argument.
        random: takes a seed.
        method: it is a method of tensors.
        spellings: what torch calls it.
        rule: arguments -> what comes out. Raises where torch would fail.
        work: what computing it takes.
        bound: what comes out at most, where `rule` can't tell because it depends on values.
        partial: `rule` copes with UNKNOWN arguments.
    """

    name: str
    signatures: tuple[Signature, ...]
    outputs: tuple[str, ...] | None
    view: bool
    random: bool
    method: bool
    spellings: tuple[str, ...]
    rule: Rule = field(repr=False)
    work: Work = field(repr=False)
    bound: Rule | None = field(default=None, repr=False)
    partial: bool = False


def elementwise(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """One operation an element."""
    return sum(spec.numel for spec in outputs), 0


def no_work(bound: Bound, outputs: Outputs) -> tuple[int, int]:
    """A view: nothing is computed and nothing allocated."""
    return 0, -sum(spec.nbytes for spec in outputs)


class Family:
    """Operations declared together."""

    def __init__(self) -> None:
        self.ops: dict[str, Op] = {}

    def declare(
        self,
        lines: str,
        rule: Rule,
        work: Work = elementwise,
        *,
        bound: Rule | None = None,
        view: bool = False,
        random: bool = False,
        partial: bool = False,
    ) -> None:
        """Add the operations of `lines`, which share everything else."""
        for line in filter(None, map(str.strip, re.sub(r",\n\s*", ", ", lines).splitlines())):
            places, name, signature = _parse(line)
            known = self.ops.get(name)
            if known is not None:
                self.ops[name] = replace(known, signatures=(*known.signatures, signature))
                continue
            spelled = tuple(_PLACES[place] + name.removeprefix("linalg_") for place in places if place != "-")
            self.ops[name] = Op(
                name=name,
                signatures=(signature,),
                outputs=signature.outputs,
                view=view,
                random=random,
                method="m" in places,
                spellings=spelled,
                rule=rule,
                work=work,
                bound=bound,
                partial=partial,
            )


def _parse(line: str) -> tuple[str, str, Signature]:
    places, _, rest = line.partition(" ")
    name, _, tail = rest.partition("(")
    inside, _, after = tail.rpartition(")")
    outputs = tuple(out.strip() for out in after.replace("->", "").split(",")) if after.strip() else None
    params = tuple(_param(text) for text in inside.split(", ")) if inside else ()
    further = params[-1] if params and inside.rpartition(", ")[2].startswith("**") else None
    return places, name, Signature(params[:-1] if further else params, outputs, further)


_PARAMS: dict[str, Param] = {}


def _param(text: str) -> Param:
    found = _PARAMS.get(text)
    if found is None:
        head, _, rest = text.partition(": ")
        kind_text, has_default, default = rest.partition(" = ")
        found = _PARAMS[text] = Param(
            name=head.lstrip("*"),
            kind=kind_text,
            default=ast.literal_eval(default) if has_default else None,
            required=not has_default,
            variadic=head.startswith("*"),
            type=kind(kind_text),
        )
    return found
