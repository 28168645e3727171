"""Which views share memory with what they are of, so that a write to either is seen by both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BadArgument
from ..graph import ops
from ..graph.ops.convert import NAMED
from ..graph.values import Ref, TensorSpec

if TYPE_CHECKING:
    from .bases import View
    from .recorder import Recorder

CONVERSIONS = frozenset({"to", "type", "type_as", *NAMED})
"""Views that are none where they change the dtype."""


MAY_COPY = frozenset({"reshape", "flatten", "ravel", "reshape_as", "contiguous"})
"""Views that are copies where the layout in memory asks for one."""

RESHAPES = frozenset({"reshape", "flatten", "ravel"})
"""Those that can be taken as `view`, which fails where they would copy."""


def again(recorder: Recorder, node: int, view: View) -> int:
    """The node of a view taken before `node`, its base's newest version, was written.

    What may have been a copy then is taken as a view now: that fails where it runs if it was one, which would have
    kept the old value.

    Raises BadArgument: it can't be told which it was.
    """
    name, *args = view
    seen = ops.infer(name, (recorder.spec(node), *args), {}) if name in RESHAPES else None
    if isinstance(seen, TensorSpec):
        return recorder.node("view", (Ref(node), seen.shape))
    if name == "contiguous":
        return recorder.node("still_contiguous", (Ref(node),))
    if name in MAY_COPY:
        raise BadArgument(
            f"{name}() may have made a copy, and what it was taken of was written since: use it before the write, "
            f"or take a copy for certain, with .clone()"
        )
    return recorder.node(name, (Ref(node), *args))


def shares(recorder: Recorder, source: Ref, view: View, node: int) -> bool:
    """Whether what a view op gives, `node`, is the same memory as `source`."""
    name, *args = view
    if name == "getitem":
        return not any(_picks(recorder, item) for item in args[0])
    copies = name == "to" and args[2]
    return name not in CONVERSIONS or (recorder.spec(source.id) == recorder.spec(node) and not copies)


def _picks(recorder: Recorder, item: Any) -> bool:
    """Whether an index item copies what it selects: masks, lists, tensors but for single integers."""
    if not isinstance(item, Ref):
        return isinstance(item, list)
    spec = recorder.spec(item.id)
    return not isinstance(spec, TensorSpec) or bool(spec.shape) or spec.dtype == "bool"
