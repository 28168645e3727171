"""Arguments as written -> arguments by parameter, checked and in their normal form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import BadArgument
from .declare import Op, Param, Signature
from .kinds import MISS, IsTensor, is_spec

_ALIASES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "self": "input", "axes": "dims"}

_NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "out": lambda value: value is None,
    "inplace": lambda value: value is False,
    "device": lambda value: value is None,
    "layout": lambda value: value is None,
    "pin_memory": lambda value: not value,
    "requires_grad": lambda value: value is False,
    "memory_format": lambda value: True,
    "non_blocking": lambda value: True,
    "_stacklevel": lambda value: True,
    "size_average": lambda value: value is None,
    "reduce": lambda value: value is None,
    "scale_grad_by_freq": lambda value: value is False,
    "sparse": lambda value: value is False,
    "max_norm": lambda value: value is None,
    "generator": lambda value: value is None,
    "weight": lambda value: value is None,
    "norm_type": lambda value: value == 2.0,
    "return_indices": lambda value: value is False,
    "antialias": lambda value: value is False,
}
"""What torch's own wrappers pass along: accepted, and dropped, where it asks for nothing."""

_ADVICE = {
    "out": "results always are new values",
    "device": "a graph runs where the model is",
    "inplace": "use the result, or write it: x[:] = ...",
    "generator": "give seed=... instead",
}


class _Unfit(Exception):
    """The arguments don't fit a signature. `distance`: how far they came."""

    def __init__(self, reason: str, distance: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.distance = distance


def bind(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any], is_tensor: IsTensor = is_spec) -> dict[str, Any]:
    """Arguments by parameter name, defaults filled in, of the first signature that fits.

    Args:
        is_tensor: what counts as a tensor; specs and references unless told otherwise.

    Raises:
        BadArgument: naming the parameter and the kinds it takes.
    """
    return match(op, args, kwargs, is_tensor)[1]


def match(
    op: Op, args: Sequence[Any], kwargs: Mapping[str, Any], is_tensor: IsTensor = is_spec
) -> tuple[Signature, dict[str, Any]]:
    """The signature that fits, and the arguments by name. Raises BadArgument."""
    worst: _Unfit | None = None
    for signature in op.signatures:
        try:
            return signature, _fit(signature, args, kwargs, is_tensor)
        except _Unfit as unfit:
            if worst is None or unfit.distance > worst.distance:
                worst = unfit
    assert worst is not None
    usage = " or ".join(f"{op.name}{signature}" for signature in op.signatures)
    raise BadArgument(f"{op.name}: {worst.reason}; it is called {usage}", op=op.name)


def _fit(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any], is_tensor: IsTensor
) -> dict[str, Any]:
    params = signature.params
    bound: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    if kwargs:
        kwargs, rest = (kwargs, {}) if signature.rest is None else _part(params, kwargs)
        kwargs = _tidy(params, kwargs)
    at, count, named = 0, len(args), 0
    for param in params:
        name = param.name
        if at < count:
            value = args[at]
            at += 1
            if param.variadic and type(value) not in (list, tuple) and not isinstance(value, (list, tuple)):
                value = tuple(args[at - 1 :])
                at = count
        elif kwargs and name in kwargs:
            value = kwargs[name]
            named += 1
        elif param.required:
            raise _Unfit(f"{name} is missing" + _hint(name), len(bound))
        else:
            bound[name] = param.default
            continue
        if type(value) not in param.type.exact:
            normal = param.type.check(value, is_tensor)
            if normal is MISS:
                raise _Unfit(f"{name} takes {param.type.words}, not {_describe(value)}", len(bound))
            value = normal
        bound[name] = value
    if at < count:
        raise _Unfit(f"{count} arguments given, {len(params)} known", len(bound))
    if named < len(kwargs):
        raise _Unfit(_surplus(params, kwargs), len(bound))
    if signature.rest is not None:
        bound[signature.rest.name] = _checked_rest(signature.rest, rest, is_tensor)
    return bound


def _part(params: tuple[Param, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of the parameters, and the others."""
    known = {param.name for param in params}
    own = {name: value for name, value in kwargs.items() if name in known}
    return own, {name: value for name, value in kwargs.items() if name not in known}


def _checked_rest(param: Param, values: Mapping[str, Any], is_tensor: IsTensor) -> dict[str, Any]:
    checked = {name: param.type.check(value, is_tensor) for name, value in values.items()}
    for name, value in checked.items():
        if value is MISS:
            raise _Unfit(f"{name} takes {param.type.words}, not {_describe(values[name])}", 0)
    return checked


def _tidy(params: tuple[Param, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keyword arguments with other names of parameters resolved and empty ones dropped."""
    known = {param.name for param in params}
    if kwargs.keys() <= known:
        return kwargs
    tidy = {}
    for name, value in kwargs.items():
        if name not in known:
            neutral = _NEUTRAL.get(name)
            if neutral is not None and neutral(value):
                continue
            alias = _ALIASES.get(name)
            name = alias if alias in known and alias not in kwargs else name
        tidy[name] = value
    return tidy


def _surplus(params: tuple[Param, ...], kwargs: Mapping[str, Any]) -> str:
    known = {param.name for param in params}
    strange = next((name for name in kwargs if name not in known), None)
    if strange is None:
        return "an argument is given both by position and by name"
    advice = _ADVICE.get(strange)
    return f"{strange!r} isn't an argument of it" + (f" ({advice})" if advice else "")


def _hint(name: str) -> str:
    hints = {
        "seed": " (a graph has no global random state: give seed=0)",
        "num_classes": " (the size of the result can't depend on values)",
    }
    return hints.get(name, "")


def _describe(value: Any) -> str:
    if isinstance(value, (bool, int, float, str, type(None))):
        shown = repr(value)
        return shown if len(shown) <= 40 else f"{shown[:37]}..."
    name = type(value).__name__
    return f"a{'n' * (name[0] in 'aeiouAEIOU')} {name}"
