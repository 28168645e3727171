"""Kinds of intervention, each done at a named point of an architecture and compared with its twin by hand.

Which points there are comes from the manifest: a point that is new is in the matrix without a line here, and fails
until `by_hand` has a twin for it. `PYTHONPATH=tests python tests/faithful/matrix.py` prints which cells are
compared, and why the others aren't.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from at_points import COMPUTED, ROW, At, inputs, module, offered, ours
from by_hand import BLOCK, HANDS, TAPS, spotted
from decoding import decode
from interpose.errors import BadArgument, ShapeUnknown
from interpose.runtime.engine import EngineJob
from torch import Tensor
from twins import close, same

AT = 3
"""The position that is changed."""

OTHER = [40, 8, 77, 130, 5, 99, 210]
"""A prompt as long as `ROW`."""

NEW, STEP = 4, 2
"""Tokens generated, and the step at which something is done."""

Change = Callable[[Any], None]
"""What is done in place to a value: one text for real tensors and deferred ones."""

Check = Callable[[At], None]


# -- changes -----------------------------------------------------------------------------------------------------


def scale(at: At) -> Change:
    """Part of one position, not a factor for all, which norms undo."""

    def change(value: Any) -> None:
        if at.name == "expert_ids":
            value[:, AT] = value[:, AT].flip(-1)
        elif at.name == "router_logits":
            value[:, AT] *= -1.5
        elif at.name in TAPS:
            value[:, :, AT, :2] *= 1.5
        else:
            value[:, AT, ..., ::2] *= 1.5

    return change


def position(at: At) -> Change:
    """One position takes another's value."""

    def change(value: Any) -> None:
        if at.name in TAPS:
            value[:, :, AT] = value[:, :, 1]
        else:
            value[:, AT] = value[:, 0]

    return change


def head(at: At) -> Change:
    """A head's values are those of another; where there are no heads, a slice of the last dimension."""

    def change(value: Any) -> None:
        if at.name in TAPS:
            value[:, -1] = value[:, 0] * 0.5
        elif value.ndim == 4:
            value[:, :, -1] = value[:, :, 0] * 0.5
        elif at.name == "expert_ids":
            value[:, 1:AT, 0] = value[:, 1:AT, 1]
        else:
            value[:, 1:AT, ::3] -= 0.5

    return change


def newest(at: At) -> Change:
    """What is done in a step of a generation, where there is one position."""

    def change(value: Any) -> None:
        if at.name == "expert_ids":
            value[:, -1] = value[:, -1].flip(-1)
        elif at.name in TAPS:
            value[:, :, -1] *= -1.5
        elif at.name in ("pos_embed", "embed"):
            value[:, -1, ::2] = 3.0
        else:
            value[:, -1, ..., ::2] *= -1.5

    return change


def since(at: At, start: int) -> Any:
    """The index of all positions from one on; inside attention, heads come first."""
    return (slice(None),) * (2 if at.name in TAPS else 1) + (slice(start, None),)


# -- checks ------------------------------------------------------------------------------------------------------


def unmasked(value: Tensor) -> Tensor:
    """Masked scores are as low as numbers go; beside them nothing else would count."""
    return value.masked_fill(value < -1e30, 0) if value.is_floating_point() else value


def written(at: At, change: Change) -> None:
    """The same change in place, ours and by hand."""
    model = ours(at.arch)
    expected, logits = at.hand(change)
    assert not torch.equal(logits, at.hand()[1]), "the twin moves nothing"
    with model.trace(ROW):
        change(at.read(model))
        value, moved = at.read(model).save(), model.logits.save()
    at.agree(moved, logits)
    at.agree(unmasked(value), unmasked(expected))


def read(at: At) -> None:
    model = ours(at.arch)
    with model.trace(ROW):
        value = at.read(model)
        shape = tuple(value.shape)
        value = value.save()
    expected, _ = at.hand()
    assert shape == tuple(expected.shape)
    (same if at.name not in ("head_out",) else close)(value, expected)


def replace(at: At) -> None:
    """The whole value, by a tensor of ours."""
    model = ours(at.arch)
    old, plain = at.hand()
    new = torch.randn(old.shape, generator=torch.Generator().manual_seed(3)) * unmasked(old).float().std()
    if at.name == "pattern":
        new = new.softmax(-1)
    if at.name == "expert_ids":
        new = (old + 1) % 5
    value, logits = at.hand(lambda value: value.copy_(new))  # type: ignore[arg-type, return-value]
    assert not torch.equal(logits, plain), "the twin moves nothing"
    with model.trace(ROW):
        setattr(at.owner(model), at.name, new)
        found, moved = at.read(model).save(), model.logits.save()
    at.agree(moved, logits)
    at.agree(found, value)


def across_invokes(at: At) -> None:
    """One prompt's value in place of another's, in one forward."""
    model = ours(at.arch)

    def patch(value: Tensor) -> None:
        value[1] = value[0]

    rows = [OTHER, ROW]
    value, logits = at.hand(patch, rows)
    if at.name == "pos_embed":
        assert torch.equal(value[0], at.hand(None, rows)[0][1]), "positions are embedded alike for all"
    else:
        assert not torch.equal(logits[1], at.hand(None, rows)[1][1]), "the twin moves nothing"
    with model.trace() as tracer:
        with tracer.invoke(OTHER):
            source = at.read(model)
        with tracer.invoke(ROW):
            at.read(model)[:] = source
            found, moved = at.read(model).save(), model.logits.save()
    at.agree(moved, logits[1:])
    at.agree(unmasked(found), unmasked(value[1:]))


def across_runs(at: At) -> None:
    """One run's value, scaled, in place of another run's: a session."""
    model = ours(at.arch)
    factor = 1 if at.name == "expert_ids" else 0.5
    source, _ = at.hand(None, [OTHER])

    late = since(at, 1)

    def patch(value: Tensor) -> None:
        value[late] = source[late] * factor

    _, logits = at.hand(patch)
    assert not torch.equal(logits, at.hand()[1]), "the twin moves nothing"
    with model.session():
        with model.trace(OTHER):
            taken = at.read(model)
        with model.trace(ROW):
            at.read(model)[late] = taken[late] * factor
            moved = model.logits.save()
    at.agree(moved, logits)


def parameter(at: At) -> None:
    """A weight of the model is added."""
    model, path = ours(at.arch), HANDS[at.arch][2]["embed"].module
    weight = at.stock.get_submodule(path).weight

    def add(value: Any, weight: Any = weight) -> None:
        value[since(at, AT)] += weight.flatten()[: value.shape[-1]]

    value, logits = at.hand(add)
    assert not torch.equal(logits, at.hand()[1]), "the twin moves nothing"
    with model.trace(ROW):
        add(at.read(model), module(model, path).weight)
        found, moved = at.read(model).save(), model.logits.save()
    at.agree(moved, logits)
    at.agree(unmasked(found), unmasked(value))


def call(at: At) -> None:
    """Modules of the model called on the value: the output projection on z, the head on what is as wide."""
    model, paths = ours(at.arch), callees(at)

    def project(value: Any, find: Callable[[str], Any]) -> Any:
        value = value.flatten(2) if at.name == "z" else value
        for path in paths:
            value = find(path)(value)
        return value

    value, _ = at.hand()
    with torch.no_grad():
        expected = project(value, at.stock.get_submodule)
    with model.trace(ROW):
        found = project(at.read(model), lambda path: module(model, path)).save()
    at.agree(found, expected)


def callees(at: At) -> list[str]:
    """Modules that take a value as wide as the point's, one after another; none if there is none."""
    blocks, inside, outside = HANDS[at.arch]
    if at.name in ("z", "mlp_post"):
        return [f"{blocks}.{BLOCK}.{inside[at.name].module}"]
    if at.arch == "bert":
        return [] if at.name in NARROW else ["cls"]
    head = at.stock.get_output_embeddings()
    last = next(path for path, found in at.stock.named_modules() if found is head)
    return [] if at.name in NARROW else [outside["final_norm"].module, last]


NARROW = {"q", "k", "v", *TAPS, "mlp_pre", "mlp_pre_linear", "logits"}
NARROW |= {"router_logits", "expert_weights", "expert_ids"}
"""What no module of the model takes as its input."""


def edit(at: At) -> None:
    """An edit that stays: in every trace of the edited model, in none of the other's."""
    model = ours(at.arch)
    change = scale(at)
    _, logits = at.hand(change)
    with model.edit() as edited:
        change(at.read(edited))
    for _ in range(2):
        with edited.trace(ROW):
            moved = edited.logits.save()
        at.agree(moved, logits)
    with model.trace(ROW):
        value, plain = at.read(model).save(), model.logits.save()
    expected, untouched = at.hand()
    assert not torch.equal(logits, untouched), "the twin moves nothing"
    (close if at.name == "head_out" else same)(value, expected)
    same(plain, untouched)


def condition(at: At) -> None:
    """A write that a number of the point itself decides over, either way."""
    model, change = ours(at.arch), scale(at)
    value, untouched = at.hand()
    total = float(value[..., 0].float().sum())
    _, changed = at.hand(change)
    assert not torch.equal(untouched, changed), "the twin moves nothing"
    for limit, expected in ((total - 1, changed), (total + 1, untouched)):
        with model.trace(ROW) as tracer:
            here = at.read(model)
            tracer.cond(here[..., 0].float().sum() > limit, lambda: change(at.read(model)))
            moved = model.logits.save()
        at.agree(moved, expected)


def generation(at: At) -> None:
    """A change at one step of a generation: tokens, each step's value and logits as in a decode loop by hand."""
    model, change = ours(at.arch), newest(at)
    steps: list[int] = []

    def at_step(value: Tensor) -> None:
        steps.append(1)
        if len(steps) == STEP + 1:
            change(value)

    plain = decode(at.stock, ROW, NEW)
    with at.caught(at_step) as values:
        expected = decode(at.stock, ROW, NEW)
    assert not torch.equal(plain[STEP, ""], expected[STEP, ""]), "the twin moves nothing"
    with model.generate(ROW, max_new_tokens=NEW, eos_token_id=-1) as tracer:
        found, logits = [], []
        for step in tracer.iter[:]:
            if step == STEP:
                change(at.read(model))
            found.append(at.read(model).save())
            logits.append(model.logits.save())
        tokens = tracer.result.save()
    for step in range(NEW):
        at.agree(logits[step], expected[step, ""])
        at.agree(unmasked(found[step]), unmasked(values[step]))
    assert torch.equal(tokens, expected.tokens)


def loss(logits: Any) -> Any:
    return logits[:, -1].square().sum()


def gradient(at: At) -> None:
    """The loss's gradient at the point."""
    model = ours(at.arch)
    leaves: list[Tensor] = []

    def cut(value: Tensor) -> None:
        leaves.append(value.detach().clone().requires_grad_())
        value.copy_(leaves[0])

    with at.caught(cut):
        loss(at.stock(**inputs(at.arch, [ROW])).logits).backward()
    with model.trace(ROW):
        value = at.read(model)
        with loss(model.logits).backward():
            found = value.grad.save()
    wanted = leaves[0].grad
    assert wanted is not None
    close(found, wanted, 1e-4)


def gradient_replaced(at: At) -> None:
    """The gradient is changed at the point, and what goes on from there reaches the embedding."""
    model = ours(at.arch)
    position = (slice(None), slice(None), AT) if at.name in TAPS else (slice(None), AT)

    def turn(gradient: Any) -> Any:
        gradient = gradient * 2
        gradient[position] *= -3
        return gradient

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return turn(gradient)

    def cut(value: Tensor) -> None:
        value.copy_(Turned.apply(value))

    plain = upstream(at, None)
    expected = upstream(at, cut)
    assert float((plain - expected).abs().max()) > 1e-2 * float(plain.abs().max()), "the twin moves nothing"
    with model.trace(ROW):
        first, value = model.embed, at.read(model)
        with loss(model.logits).backward():
            value.grad = turn(value.grad)
            found = first.grad.save()
    close(found, expected, 1e-4)


def upstream(at: At, edit: Any) -> Tensor:
    """The loss's gradient at the embedding, with the point's own gradient changed on its way there."""
    leaves: list[Tensor] = []

    def cut(value: Tensor) -> None:
        leaves.append(value.detach().clone().requires_grad_())
        value.copy_(leaves[0])

    start = HANDS[at.arch][2]["embed"]
    with spotted(at.stock, start.module, start, cut), at.caught(edit):
        loss(at.stock(**inputs(at.arch, [ROW])).logits).backward()
    assert leaves[0].grad is not None
    return leaves[0].grad


# -- beside other jobs -------------------------------------------------------------------------------------------


class Kept(dict[int, Tensor]):
    """A sink."""

    def save(self, node: int, value: Any) -> None:
        self[node] = value.clone()

    def log(self, node: int, text: str) -> None:
        raise AssertionError

    def cancelled(self) -> bool:
        return False


def beside(points: Sequence[At]) -> None:
    """A job for each point, its own prompt, all in one forward: each gets what it would get by hand alone."""
    model = ours(points[0].arch)
    graphs, rows = [], []
    for number, at in enumerate(points):
        row = [*ROW, *OTHER][: AT + 1 + 3 * number % 11]
        with model.scan(row) as tracer:
            scale(at)(at.read(model))
            at.read(model).save()
            model.logits.save()
        graphs.append(tracer.recorder.finish()[0])
        rows.append(row)
    sinks = [Kept() for _ in points]
    jobs = [EngineJob(graph, {}, sink) for graph, sink in zip(graphs, sinks, strict=True)]
    assert model._access.local.engine.run(jobs) == [None] * len(jobs)
    for at, row, sink in zip(points, rows, sinks, strict=True):
        value, logits = at.hand(scale(at), [row])
        assert not torch.equal(logits, at.hand(None, [row])[1]), f"the twin moves nothing at {at}"
        found = list(sink.values())
        assert len(found) == 2
        for one, other in zip(found, (value, logits), strict=True):
            try:
                (same if at.name == "expert_ids" and one is found[0] else close)(unmasked(one), unmasked(other))
            except AssertionError as error:
                error.add_note(f"at {at}: {float((unmasked(one) - unmasked(other)).abs().max())}")
                raise


# -- the matrix --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    check: Callable[[Sequence[At]], None]
    excuse: Callable[[At], str] = lambda at: ""
    """Why a cell isn't there, "" where it is."""
    refused: Callable[[At], bool] = lambda at: False
    error: type[Exception] = BadArgument
    """Where the language refuses it, and how."""


def _each(check: Check) -> Callable[[Sequence[At]], None]:
    def every(points: Sequence[At]) -> None:
        for at in points:
            try:
                check(at)
            except BaseException as error:
                error.add_note(f"at {at}")
                raise

    return every


def _changes(make: Callable[[At], Change]) -> Callable[[Sequence[At]], None]:
    return _each(lambda at: written(at, make(at)))


def whole_numbers(at: At) -> str:
    return "whole numbers" if at.name == "expert_ids" else ""


def replaced_gradient(at: At) -> str:
    return whole_numbers(at) or ("nothing lies before it" if at.name == "pos_embed" else "")


def makes_no_tensor(at: At) -> bool:
    """Whether the value is computed by us: no gradient comes to it."""
    return at.name in COMPUTED or at.factor != 1.0 or at.name == "router_logits"


def lies_flat(at: At) -> bool:
    """Whether rows and positions are one there, which an edit, that has no prompt yet, can't tell apart."""
    return at.inside and at.name in HANDS[at.arch][1] and HANDS[at.arch][1][at.name].flat


KINDS: dict[str, Kind] = {
    "read": Kind(_each(read)),
    "replace": Kind(_each(replace)),
    "scale": Kind(_changes(scale)),
    "position": Kind(_changes(position)),
    "head or slice": Kind(_changes(head)),
    "across invokes": Kind(_each(across_invokes)),
    "across runs": Kind(_each(across_runs)),
    "parameter": Kind(_each(parameter), whole_numbers),
    "module call": Kind(_each(call), lambda at: "" if callees(at) else "no module takes it"),
    "edit": Kind(_each(edit), refused=lies_flat, error=ShapeUnknown),
    "condition": Kind(_each(condition)),
    "generation": Kind(_each(generation), lambda at: "an encoder generates nothing" if at.arch == "bert" else ""),
    "gradient": Kind(_each(gradient), whole_numbers, makes_no_tensor),
    "gradient replaced": Kind(_each(gradient_replaced), replaced_gradient, makes_no_tensor),
    "beside others": Kind(beside),
}


def cells(arch: str, kind: str) -> tuple[list[At], list[At], dict[str, str]]:
    """Points that are compared, points at which it is refused, and the others' excuses."""
    of = KINDS[kind]
    excuses = {at.name: reason for at in offered(arch) if (reason := of.excuse(at))}
    points = [at for at in offered(arch) if at.name not in excuses]
    return [at for at in points if not of.refused(at)], [at for at in points if of.refused(at)], excuses


def show() -> None:
    """Print how many points each architecture has for each kind, and every cell that isn't compared."""
    missing = Counter[tuple[str, str]]()
    print(f"{'points compared':18}", *(f"{arch[:9]:>9}" for arch in HANDS))
    for kind in KINDS:
        counts = []
        for arch in HANDS:
            there, refused, excuses = cells(arch, kind)
            counts.append(len(there))
            missing.update((kind, f"{at.name}: refused with {KINDS[kind].error.__name__}") for at in refused)
            missing.update((kind, f"{name}: {reason}") for name, reason in excuses.items())
        print(f"{kind:18}", *(f"{count:9}" for count in counts))
    print("\nnot compared")
    for (kind, reason), count in sorted(missing.items()):
        print(f"{kind:18} {reason} ({count} architectures)")


if __name__ == "__main__":
    show()
