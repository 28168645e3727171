"""What a block leaves open or names, for when its graph is run again."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BadArgument
from .outside import is_deferred
from .recorder import Recorder

RESERVED = frozenset({"model", "prompt", "prompts", "layers", "remote", "timeout", "batching"})
"""Names that `Program.run` has for itself."""


def parameter(recorder: Recorder, name: str, default: Any) -> Any:
    """The deferred value of a parameter: a copy of `default`, a number or a tensor.

    A number has no dimensions, and so leaves the dtype of what it is combined with as it is.

    Raises:
        BadArgument: a name that can't be a keyword of `run`, or is there already; a default of another kind.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in RESERVED or len(name) > 64:
        raise BadArgument(f"a parameter's name is a Python name, and none of {', '.join(sorted(RESERVED))}")
    if is_deferred(default):
        raise BadArgument("a parameter's default is a number or a tensor known now, not a deferred value")
    if name in recorder.parameters:
        raise BadArgument(f"there is a parameter {name!r} already; use the value it gave")
    node = recorder.attachments.attach(_own(recorder, default))
    recorder.parameters[name] = recorder.nodes[node].args[0]
    return recorder.value(node)


def _own(recorder: Recorder, default: Any) -> Any:
    # Of its own: an attachment is known by its tensor, and the user's may be used beside the parameter.
    if isinstance(default, float):
        return np.array(default, "float64" if recorder.manifest.dtype == "float64" else "float32")
    if isinstance(default, (bool, int, np.generic, np.ndarray)):
        return np.array(default)
    if hasattr(default, "detach"):
        return default.detach().clone()
    raise BadArgument(f"a parameter is a number or a tensor, not a {type(default).__name__}")


def named(recorder: Recorder, name: str, value: Any) -> Any:
    """Save a value under a name. Raises BadArgument if the name is taken, or the value isn't deferred."""
    if not isinstance(name, str) or not name or len(name) > 64 or not name.isprintable():
        raise BadArgument("a saved value's name is a text of 1 to 64 characters")
    if name in recorder.names.values():
        raise BadArgument(f"something is saved as {name!r} already")
    if not is_deferred(value):
        raise BadArgument(f"only a deferred value can be saved, not a {type(value).__name__}")
    kept = recorder.save(value)
    recorder.names[recorder.saved[-1][0]] = name
    return kept
