"""Equations of einsum: `ij,jk->ik`, with `...`, checked against shapes and taken two operands at a time."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import BadArgument, ShapeMismatch
from .shapes import Shape

MAX_OPERANDS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """Attributes:
    steps: equations of one or two operands each, applied from the left: the result so far, the next operand.
    shape: of the result.
    flops: of all steps.
    held: most elements of a result in between.
    """

    steps: tuple[str, ...]
    shape: Shape
    flops: int
    held: int


def plan(equation: str, shapes: Sequence[Shape]) -> Plan:
    """How to compute an equation on operands of these shapes.

    Raises:
        BadArgument: not an equation, or for another number of operands.
        ShapeMismatch: a letter that stands for two sizes.
    """
    inputs, output = _letters(equation, shapes)
    sizes = _sizes(inputs, shapes)
    flops = held = 0
    steps = []
    have = inputs[0]
    for at, taken in enumerate(inputs[1:], 1):
        later = set(output).union(*inputs[at + 1 :])
        union = list(dict.fromkeys(have + taken))
        kept = output if at == len(inputs) - 1 else "".join(letter for letter in union if letter in later)
        steps.append(f"{have},{taken}->{kept}")
        flops += 2 * math.prod(sizes[letter] for letter in union)
        # A letter of size 1 in one operand may widen the other before they meet.
        held = max(held, sum(math.prod(sizes[letter] for letter in labels) for labels in (have, taken, kept)))
        have = kept
    if not steps:
        steps.append(f"{have}->{output}")
        flops = held = math.prod(sizes[letter] for letter in set(have))
    return Plan(tuple(steps), tuple(sizes[letter] for letter in output), flops, held)


def _letters(equation: str, shapes: Sequence[Shape]) -> tuple[list[str], str]:
    """One letter for each dimension of each operand, and of the result, with `...` written out."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(shapes):
        raise BadArgument(f"einsum: {equation!r} is for {len(terms)} tensors, {len(shapes)} given")
    if len(terms) > MAX_OPERANDS:
        raise BadArgument(f"einsum takes up to {MAX_OPERANDS} tensors; multiply in several steps")
    used = set(equation)
    spare = [letter for letter in string.ascii_letters if letter not in used]
    widths = [_ellipsis_width(term, shape, equation) for term, shape in zip(terms, shapes, strict=True)]
    width = max(widths)
    if width > len(spare):
        raise BadArgument(f"einsum: {equation!r} has too many dimensions")
    dots = "".join(spare[:width])
    inputs = [term.replace("...", dots[width - own :]) for term, own in zip(terms, widths, strict=True)]
    if arrow:
        output = right.replace("...", dots)
    else:
        body = "".join(terms).replace("...", "")
        output = dots + "".join(sorted(letter for letter in set(body) if body.count(letter) == 1))
    known = set("".join(inputs))
    if not set(output) <= known or len(set(output)) != len(output) or not output.isascii():
        raise BadArgument(f"einsum: {equation!r}: the result names letters twice, or ones no operand has")
    return inputs, output


def _ellipsis_width(term: str, shape: Shape, equation: str) -> int:
    letters = term.replace("...", "", 1)
    if not (letters.isascii() and (letters.isalpha() or not letters)):
        raise BadArgument(f"einsum: {equation!r} isn't an equation; one is 'bij,bjk->bik'")
    width = len(shape) - len(letters)
    if width < 0 or (width and "..." not in term):
        raise ShapeMismatch(f"einsum: {term!r} in {equation!r} is for another number of dims than {list(shape)}")
    return width


def _sizes(inputs: Sequence[str], shapes: Sequence[Shape]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for letters, shape in zip(inputs, shapes, strict=True):
        own: dict[str, int] = {}
        for letter, size in zip(letters, shape, strict=True):
            if own.setdefault(letter, size) != size:
                raise ShapeMismatch(f"einsum: {letter!r} stands for {own[letter]} and {size} in one tensor")
            known = sizes.setdefault(letter, size)
            if known == 1:
                sizes[letter] = size
            elif size not in (1, known):
                raise ShapeMismatch(f"einsum: {letter!r} stands for {known} and {size}")
    return sizes
