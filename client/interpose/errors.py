"""Every error Interpose raises, one stable wire code a class.

InterposeError
├── GraphError                    what the program inside the block asked for
│   ├── InvalidGraph              a malformed encoding
│   ├── UnknownModule             no such module in the model
│   ├── UnknownPoint              the module has no such hook point
│   ├── UnknownOp                 not in the op table
│   ├── UnknownAdapter            the model has no such adapter
│   ├── BadArgument               an argument of the wrong kind or value
│   ├── ShapeMismatch             shapes or dtypes that don't fit
│   ├── IndexOutOfRange           an index, token id or position outside its range
│   ├── WrongOrder                a value is used before the model has computed it
│   ├── NotReached                the forward never came to this point
│   └── OpFailed                  the operation itself failed while running
├── DeferredError                 the value exists only after the block
│   ├── NotSaved                  ... and this one was never saved
│   ├── ControlFlow               Python branched on a deferred value
│   └── ShapeUnknown              the shape depends on values
├── LimitError                    a limit of the server or of the job
│   ├── LimitExceeded             too large: nodes, bytes, operations, tokens
│   ├── QueueFull                 too many jobs waiting
│   ├── JobTimeout                the wall-time limit
│   ├── StorageFull               the server's blob store is at its cap
│   └── OutOfMemory               the job alone doesn't fit the device
├── AccessError                   who is asking
│   ├── Unauthorized              missing or wrong key
│   └── Forbidden                 the key may not do this
├── RequestError                  what was asked of the server
│   ├── InvalidPayload            bytes that aren't a job
│   ├── UnknownModel              not served here
│   ├── ModelUpdated              served here, but no more as it was when the graph was recorded
│   ├── ModelUnavailable          served here, not able to run now
│   │   ├── ModelLoading          ... but soon: it was asked for and is on its way
│   │   └── ModelFailed           ... because it can't be loaded
│   ├── UnknownJob                no such job, or its result has expired
│   ├── JobConflict               the same job id with another payload
│   ├── MissingAttachment         the job names a tensor that was never uploaded
│   ├── VersionMismatch           client and server speak different protocols
│   └── NotFound                  no such resource
├── JobError                      how an accepted job ended
│   ├── JobCancelled
│   ├── JobPoisoned               its worker died each time it ran
│   ├── ReplicaLost               a part of the model's copy is gone; what it ran is run again elsewhere
│   └── InternalError             our fault
│       └── StorageUnavailable    the server's blob store can't be reached
├── ConnectionFailed              the server can't be reached
└── ConfigError                   no host, no key, or a missing extra
"""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Source:
    """The user's line that made a node."""

    file: str
    line: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        return f"{self.file}:{self.line}" + (f": {text}" if text else "")


class InterposeError(Exception):
    """Base of every error of this library.

    Args:
        message: what went wrong and what to do, for a person.
        node: id of the graph node at fault, if one is.
        op: that node's op.
        source: the user's line of that node.
        details: JSON-able figures, such as a limit and what was asked for.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        node: int | None = None,
        op: str | None = None,
        source: Source | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.node = node
        self.op = op
        self.source = source
        self.details = dict(details or {})

    def __str__(self) -> str:
        parts = [self.message]
        if self.node is not None:
            parts.append(f"  node {self.node}" + (f" ({self.op})" if self.op else ""))
        if self.source is not None:
            parts.append(f"  at {self.source}")
        return "\n".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.node, self.op, self.source, self.details)

    def at(self, node: int, op: str, source: Source | None) -> InterposeError:
        """Name the node this error belongs to, unless one is named already. Returns self."""
        if self.node is None:
            self.node, self.op = node, op
        if self.source is None:
            self.source = source
        return self

    def to_wire(self) -> dict[str, Any]:
        """The JSON form: `code`, `message` and, where known, `node`, `op`, `details`.

        The line stays with the client, which knows it from the node.
        """
        wire: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.node is not None:
            wire["node"] = self.node
        if self.op is not None:
            wire["op"] = self.op
        if self.details:
            wire["details"] = self.details
        return wire


def _rebuild(
    cls: type[InterposeError],
    message: str,
    node: int | None,
    op: str | None,
    source: Source | None,
    details: dict[str, Any],
) -> InterposeError:
    return cls(message, node=node, op=op, source=source, details=details)


class GraphError(InterposeError):
    code, status = "graph_error", 422


class InvalidGraph(GraphError):
    code = "invalid_graph"


class UnknownModule(GraphError, AttributeError):
    code = "unknown_module"


class UnknownPoint(GraphError, AttributeError):
    code = "unknown_point"


class UnknownOp(GraphError, AttributeError):
    code = "unknown_op"


class UnknownAdapter(GraphError, LookupError):
    code = "unknown_adapter"


class BadArgument(GraphError, TypeError):
    code = "bad_argument"


class ShapeMismatch(GraphError, ValueError):
    code = "shape_mismatch"


class IndexOutOfRange(GraphError, IndexError):
    code = "index_out_of_range"


class WrongOrder(GraphError):
    code = "wrong_order"


class NotReached(GraphError):
    code = "point_not_reached"


class OpFailed(GraphError):
    code = "op_failed"


class DeferredError(InterposeError):
    code, status = "deferred", 422


class NotSaved(DeferredError):
    code = "not_saved"


class ControlFlow(DeferredError, TypeError):
    code = "deferred_control_flow"


class ShapeUnknown(DeferredError):
    code = "shape_unknown"


class LimitError(InterposeError):
    code, status = "limit", 413


class LimitExceeded(LimitError):
    code = "limit_exceeded"


class QueueFull(LimitError):
    code, status = "queue_full", 429


class JobTimeout(LimitError):
    code, status = "job_timeout", 408


class StorageFull(LimitError):
    code, status = "storage_full", 507


class OutOfMemory(LimitError):
    code = "out_of_memory"


class AccessError(InterposeError):
    code, status = "access", 403


class Unauthorized(AccessError):
    code, status = "unauthorized", 401


class Forbidden(AccessError):
    code = "forbidden"


class RequestError(InterposeError):
    code, status = "request", 400


class InvalidPayload(RequestError):
    code = "invalid_payload"


class UnknownModel(RequestError):
    code, status = "unknown_model", 404


class ModelUpdated(RequestError):
    code, status = "model_updated", 409


class ModelUnavailable(RequestError):
    code, status = "model_unavailable", 503


class ModelLoading(ModelUnavailable):
    code = "model_loading"


class ModelFailed(ModelUnavailable):
    code = "model_failed"


class UnknownJob(RequestError):
    code, status = "unknown_job", 404


class JobConflict(RequestError):
    code, status = "job_conflict", 409


class MissingAttachment(RequestError):
    code, status = "missing_attachment", 409


class VersionMismatch(RequestError):
    code, status = "version_mismatch", 426


class NotFound(RequestError):
    code, status = "not_found", 404


class JobError(InterposeError):
    code = "job_error"


class JobCancelled(JobError):
    code, status = "job_cancelled", 410


class JobPoisoned(JobError):
    code = "job_poisoned"


class ReplicaLost(JobError):
    code, status = "replica_lost", 503


class InternalError(JobError):
    code = "internal_error"


class StorageUnavailable(InternalError):
    code, status = "storage_unavailable", 503


class ConnectionFailed(InterposeError, ConnectionError):
    code, status = "connection_failed", 503


class ConfigError(InterposeError):
    code, status = "config", 400


def first_line(error: BaseException, most: int = 300) -> str:
    """What another library's error says, in one line of so many characters; its class where it says nothing."""
    return str(error).strip().partition("\n")[0].rstrip(".")[:most] or type(error).__name__


def _tree(root: type[InterposeError]) -> dict[str, type[InterposeError]]:
    found = {root.code: root}
    for sub in root.__subclasses__():
        found |= _tree(sub)
    return found


BY_CODE: Mapping[str, type[InterposeError]] = _tree(InterposeError)


def from_wire(wire: Mapping[str, Any], source: Source | None = None) -> InterposeError:
    """The error a server described, as the class of its code.

    A code this client doesn't know becomes a plain InterposeError that names it.
    """
    code = str(wire.get("code", "error"))
    message = str(wire.get("message", "the server gave no reason"))
    cls = BY_CODE.get(code, InterposeError)
    if cls is InterposeError and code != InterposeError.code:
        message = f"{message} [{code}]"
    node, op, details = wire.get("node"), wire.get("op"), wire.get("details")
    return cls(
        message,
        node=node if isinstance(node, int) else None,
        op=op if isinstance(op, str) else None,
        source=source,
        details=details if isinstance(details, dict) else None,
    )
