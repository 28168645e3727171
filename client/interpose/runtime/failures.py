"""What goes wrong while a graph runs, as this job's own failure, located at a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import InterposeError, NotReached, OpFailed, ReplicaLost, first_line
from ..graph.model import Node

if TYPE_CHECKING:
    from .interpreter import Interpreter


class Guard:
    """A context that turns whatever is raised inside into a job's failure."""

    def __init__(self, job: Interpreter) -> None:
        self.job = job

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        # Where a part of the model is gone, no job has failed: all are run again elsewhere.
        if not isinstance(error, InterposeError) or isinstance(error, ReplicaLost):
            return False
        self.job.fail(error)
        return True


def located(error: Exception, node: Node) -> Exception:
    """The error as one of ours that names the node."""
    found = plain(error)
    return found.at(node.id, node.op, node.source) if isinstance(found, InterposeError) else found


def plain(error: Exception) -> Exception:
    """The error as one of ours, torch's own as OpFailed with their first line; but what is the device's stays."""
    if isinstance(error, (InterposeError, torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)):
        return error
    return OpFailed(first_line(error))


def unreached(node: Node) -> NotReached:
    """The error of a node whose point the forward never came to."""
    return NotReached(f"this forward never came to {node.point}", node=node.id, op=node.op, source=node.source)
