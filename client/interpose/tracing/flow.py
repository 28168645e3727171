"""Conditions and loops that run where the model does: their bodies are recorded once, as parts of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BadArgument
from ..graph.values import DType, Ref
from .nests import Several
from .outside import is_deferred
from .recorder import Recorder


@contextmanager
def _body(recorder: Recorder, control: int) -> Iterator[None]:
    before, recorder.when = recorder.when, control
    try:
        yield
    finally:
        recorder.when = before


def _tensor(recorder: Recorder, value: Any) -> Ref:
    """A reference to a tensor, deferred or from outside."""
    given = recorder.arg(value)
    if isinstance(given, (bool, int, float)):
        dtype = "bool" if isinstance(given, bool) else "int64" if isinstance(given, int) else "float32"
        given = recorder.arg(recorder.op("full", ((), given), {"dtype": DType(dtype)}))
    if not isinstance(given, Ref):
        raise BadArgument(f"a tensor or a number is expected here, not {type(value).__name__}")
    return given


def _results(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _alike(given: Any, values: list[Any]) -> Any:
    """Values in the form the user's function gave them: none, one, or several."""
    if given is None:
        return None
    return Several(values) if isinstance(given, (tuple, list)) else values[0]


def cond(recorder: Recorder, pred: Any, then: Callable[[], Any], otherwise: Callable[[], Any] | None) -> Any:
    """Record both bodies; the one `pred` chooses will run."""
    if not is_deferred(pred):
        chosen = then if bool(pred) else otherwise
        return chosen() if chosen is not None else None
    ref = Ref(recorder.ref(pred))
    branches, results = [], []
    for wanted, function in ((True, then), (False, otherwise)):
        branches.append(recorder.node("branch", (ref, wanted)))
        with _body(recorder, branches[-1]):
            result = function() if function is not None else None
            results.append((result, tuple(_tensor(recorder, value) for value in _results(result))))
    (given, one), (_, two) = results
    if len(one) != len(two):
        raise BadArgument(f"both ways must give the same number of values: {len(one)} and {len(two)}")
    values = [
        recorder.value(recorder.node("choose", (*map(Ref, branches), left, right)))
        for left, right in zip(one, two, strict=True)
    ]
    return _alike(given, values)


@contextmanager
def branch(recorder: Recorder, pred: Any) -> Iterator[None]:
    """A block that runs where `pred` holds. Raises BadArgument for a condition that isn't deferred."""
    if not is_deferred(pred):
        raise BadArgument("this condition is known already: write a Python if")
    with _body(recorder, recorder.node("branch", (Ref(recorder.ref(pred)), True))):
        yield


def loop(
    recorder: Recorder,
    count: int,
    body: Callable[..., Any],
    init: tuple[Any, ...],
    *,
    proceed: Callable[..., Any] | None = None,
    stacked: bool = False,
) -> Any:
    """Record a loop's body once.

    Args:
        body: (turn, *carried) -> the next carried values; with `stacked`: a pair of those and one value to gather.
        proceed: (*carried) -> whether to make another turn.

    Returns:
        The carried values at the end; with `stacked` a pair of those and the gathered values [turns, ...].
    """
    if not isinstance(count, int) or isinstance(count, bool):
        raise BadArgument("a loop's number of turns is a whole number; to end by a value use t.while_loop")
    start = recorder.node("loop", (count, tuple(_tensor(recorder, value) for value in init)))
    with _body(recorder, start):
        carried = [recorder.value(recorder.node("carry", (index,))) for index in range(len(init))]
        keep = None if proceed is None else _tensor(recorder, proceed(*carried))
        turn = recorder.value(recorder.node("turn"))
        result = body(turn, *carried)
        each: tuple[Ref, ...] = ()
        if stacked:
            if not isinstance(result, (tuple, list)) or len(result) != 2:
                raise BadArgument("a scan's body gives a pair: what to carry on, and what to gather")
            result, gathered = result
            each = (_tensor(recorder, gathered),)
        outs = tuple(_tensor(recorder, value) for value in _results(result))
    if len(outs) != len(init):
        raise BadArgument(f"the loop carries {len(init)} values, and its body gives {len(outs)}")
    end = recorder.node("end_loop", (Ref(start), outs, keep, each))
    values = [recorder.value(recorder.node("getitem", (Ref(end), index))) for index in range(len(outs) + len(each))]
    final = _alike(result, values[: len(outs)])
    return Several([final, values[-1]]) if stacked else final
