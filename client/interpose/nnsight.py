"""nnsight's names, for notebooks that bring them: `from interpose import nnsight` where they say `import nnsight`.

What belongs to a block (`stop`, `log`, `cond`) is the open block's.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .config import CONFIG
from .errors import DeferredError, UnknownOp
from .models import LanguageModel
from .tracing.keeping import SavedDict as dict  # noqa: F401
from .tracing.keeping import SavedList as list  # noqa: F401
from .tracing.keeping import save
from .tracing.tracer import ACTIVE, Tracer
from .wrapping import Model

NNsight = Model
TransformersModel = LanguageModel

__all__ = [
    "CONFIG",
    "LanguageModel",
    "NNsight",
    "TransformersModel",
    "apply",
    "cond",
    "local",
    "log",
    "save",
    "stop",
]

_ADVICE = {
    **builtins.dict.fromkeys(
        ("int", "float", "bool", "str", "tuple"), "numbers and texts known now are kept as they are, without a save"
    ),
    "trace": "write with model.trace(...), or a plain function called in a block: it is recorded there",
    "register": "functions called in a block are recorded, not sent: leave it out",
    "ndif_status": "interpose.client.fetch_models() lists the server's models, and how each is",
    "is_model_running": "interpose.client.fetch_models() lists the server's models, and how each is",
    "session": "a session belongs to its model: with model.session():",
}


def _block() -> Tracer:
    found = ACTIVE.get()
    if not isinstance(found, Tracer):
        raise DeferredError("this belongs into a block: with model.trace(prompt): ...")
    return found


def apply(function: Callable[..., Any], *args: Any, validate: Any = None, **kwargs: Any) -> Any:
    """Call a function here: what it does with deferred values is recorded."""
    return _block().apply(function, *args, **kwargs)


def log(*values: Any) -> None:
    """Print values while the block runs."""
    _block().log(*values)


def stop() -> None:
    """Nothing later in the forward is needed."""
    _block().stop()


def cond(pred: Any) -> Any:
    """`with nnsight.cond(pred):`, a body that runs where `pred` holds."""
    return _block().cond(pred)


def local() -> AbstractContextManager[None]:
    """Nothing: a block is recorded in this process anyway."""
    return nullcontext()


def __getattr__(name: str) -> Any:
    raise UnknownOp(f"interpose.nnsight has no {name!r}" + (f": {_ADVICE[name]}" if name in _ADVICE else ""))
