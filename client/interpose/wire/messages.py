"""What travels over the websocket: typed messages, and their frames.

Every frame is binary. Its first byte says what follows: `MESSAGE`, a msgpack map with a "type"; `CHUNK`, a fixed
header and raw bytes of a save; `SUBMIT`, a fixed header and the body of a submission. Events (status, save, log,
tokens) carry a job's own sequence number, from 1, without gaps.

Decoding is strict: an unknown type or field, or a mistyped one, is an InvalidPayload.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import msgpack

from ..errors import InterposeError, InvalidPayload, from_wire
from ..graph.values import TensorSpec
from .fields import Fields, unpack
from .protocol import CHUNK_BYTES, MAX_CHUNK_BYTES, PROTOCOL
from .status import JobStatus
from .tensors import Buffer, decode_spec, encode_spec, total
from .trees import Tree

MESSAGE, CHUNK, SUBMIT = 0, 1, 2

_HEAD = struct.Struct(">B16sIQ")
_SUBMIT = struct.Struct(">B16sQ")
_MAX_SEQ = 2**32 - 1
_MAX_ITEMS = 1 << 17
_MAX_CONTAINERS = 1 << 19


class _Fields:
    """A message whose plain form is its fields, in their order."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]]

    def to_plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__match_args__}


# Client to server


@dataclass(frozen=True, slots=True)
class Subscribe(_Fields):
    """Send a job's events after number `after`; of event after + 1, if a save, the bytes from `offset` on.

    Of saves of `apart` bytes and more only the head: the client fetches their bytes over HTTP. 0: of none.
    """

    type: ClassVar[str] = "subscribe"
    job: str
    after: int = 0
    offset: int = 0
    apart: int = 0

    @classmethod
    def read(cls, fields: Fields) -> Subscribe:
        return cls(fields.job(), fields.whole("after", 0, _MAX_SEQ), fields.whole("offset"), fields.whole("apart"))


@dataclass(frozen=True, slots=True)
class Unsubscribe(_Fields):
    """Send no more of a job."""

    type: ClassVar[str] = "unsubscribe"
    job: str

    @classmethod
    def read(cls, fields: Fields) -> Unsubscribe:
        return cls(fields.job())


@dataclass(frozen=True, slots=True)
class Ack(_Fields):
    """The client has everything of the job; the server may drop its result."""

    type: ClassVar[str] = "ack"
    job: str

    @classmethod
    def read(cls, fields: Fields) -> Ack:
        return cls(fields.job())


@dataclass(frozen=True, slots=True)
class Submit:
    """Take a job in, as POST /v1/jobs would, and send its events from the first on. Refused if it isn't accepted.

    Attributes:
        apart: as of `Subscribe`.
        body: the submission's msgpack, at most `SUBMIT_BYTES`.
    """

    job: str
    apart: int
    body: Buffer


# Server to client


@dataclass(frozen=True, slots=True)
class Hello(_Fields):
    """The server's first message. `chunk_bytes`: the most raw bytes of one chunk."""

    type: ClassVar[str] = "hello"
    protocol: int = PROTOCOL
    chunk_bytes: int = CHUNK_BYTES

    @classmethod
    def read(cls, fields: Fields) -> Hello:
        return cls(fields.whole("protocol", 0, 2**31), fields.whole("chunk_bytes", 1, MAX_CHUNK_BYTES))


@dataclass(frozen=True, slots=True)
class Status:
    """The job changed state. `error` is an InterposeError's wire form, on failed and cancelled jobs."""

    type: ClassVar[str] = "status"
    job: str
    seq: int
    attempt: int
    status: JobStatus
    error: Mapping[str, Any] | None = None

    def to_plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {**_event(self), "status": str(self.status)}
        return plain if self.error is None else {**plain, "error": dict(self.error)}

    @classmethod
    def read(cls, fields: Fields) -> Status:
        name, error = fields.text("status", 32), fields.maybe("error")
        if name not in set(JobStatus) or (error is not None and not isinstance(error, dict)):
            raise InvalidPayload("a status message has an unknown status or an error that isn't a map")
        return cls(*_read_event(fields), JobStatus(name), error)


@dataclass(frozen=True, slots=True)
class Save:
    """A saved value: its tree, and the tensors whose bytes follow, one after another, in chunks.

    Those of one that comes `apart` don't follow: they are fetched over HTTP, by job and `seq`.
    """

    type: ClassVar[str] = "save"
    job: str
    seq: int
    attempt: int
    node: int
    tree: Tree
    tensors: tuple[TensorSpec, ...]
    apart: bool = False

    @property
    def nbytes(self) -> int:
        return total(self.tensors)

    def to_plain(self) -> dict[str, Any]:
        tensors = [encode_spec(spec) for spec in self.tensors]
        plain = {**_event(self), "node": self.node, "tree": self.tree, "tensors": tensors}
        return {**plain, "nbytes": self.nbytes, "apart": self.apart}

    @classmethod
    def read(cls, fields: Fields) -> Save:
        node, tree, claimed = fields.whole("node", 0, _MAX_SEQ), fields.take("tree"), fields.whole("nbytes")
        tensors = tuple(decode_spec(plain) for plain in fields.list("tensors", _MAX_ITEMS))
        if total(tensors) != claimed:
            raise InvalidPayload(f"a save of {total(tensors):,} bytes says it has {claimed:,}")
        return cls(*_read_event(fields), node, tree, tensors, fields.flag("apart"))


@dataclass(frozen=True, slots=True)
class Log(_Fields):
    """What a log node was given, as text."""

    type: ClassVar[str] = "log"
    job: str
    seq: int
    attempt: int
    node: int
    text: str

    @classmethod
    def read(cls, fields: Fields) -> Log:
        node, text = fields.whole("node", 0, _MAX_SEQ), fields.text("text", 1 << 16)
        return cls(*_read_event(fields), node, text)


@dataclass(frozen=True, slots=True)
class Tokens(_Fields):
    """What one step of a generation added: a token a row, None for a row that had ended."""

    type: ClassVar[str] = "tokens"
    job: str
    seq: int
    attempt: int
    run: int
    step: int
    ids: tuple[int | None, ...]

    @classmethod
    def read(cls, fields: Fields) -> Tokens:
        run, step = fields.whole("run", 0, _MAX_SEQ), fields.whole("step", 0, _MAX_SEQ)
        ids = fields.list("ids", _MAX_ITEMS)
        if not all(item is None or (type(item) is int and 0 <= item < 2**31) for item in ids):
            raise InvalidPayload("a tokens message holds something other than token ids")
        return cls(*_read_event(fields), run, step, tuple(ids))


@dataclass(frozen=True, slots=True)
class Position(_Fields):
    """Place in the queue, 1 being next. No event: neither numbered nor kept."""

    type: ClassVar[str] = "position"
    job: str
    position: int

    @classmethod
    def read(cls, fields: Fields) -> Position:
        return cls(fields.job(), fields.whole("position"))


@dataclass(frozen=True, slots=True)
class Loading(_Fields):
    """Why a job waits: its model's state. No event, like `Position`; only for clients that say they take it."""

    type: ClassVar[str] = "loading"
    job: str
    state: str

    @classmethod
    def read(cls, fields: Fields) -> Loading:
        return cls(fields.job(), fields.text("state", 32))


@dataclass(frozen=True, slots=True)
class Refused:
    """The server can't do what a message asked: about one job, or, without one, about the connection."""

    type: ClassVar[str] = "error"
    job: str | None
    error: Mapping[str, Any]

    def to_plain(self) -> dict[str, Any]:
        plain = dict(self.error)
        return plain if self.job is None else {**plain, "job": self.job}

    @classmethod
    def read(cls, fields: Fields) -> Refused:
        job = fields.maybe("job")
        error: dict[str, Any] = {"code": fields.text("code"), "message": fields.text("message", 1 << 16)}
        for name in ("node", "op", "details"):
            if (value := fields.maybe(name)) is not None:
                error[name] = value
        return cls(None if job is None else Fields({"job": job}, "an error").job(), error)

    @classmethod
    def of(cls, error: InterposeError, job: str | None = None) -> Refused:
        return cls(job, error.to_wire())

    def exception(self) -> InterposeError:
        return from_wire(self.error)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of the save with number `seq`, starting at `offset` of all its tensors' bytes laid end to end."""

    job: str
    seq: int
    offset: int
    data: memoryview


ClientMessage: TypeAlias = Subscribe | Unsubscribe | Ack | Submit
Event: TypeAlias = Status | Save | Log | Tokens
ServerMessage: TypeAlias = Hello | Event | Position | Loading | Refused | Chunk

_CLIENT: Mapping[str, type[Subscribe | Unsubscribe | Ack]] = {
    cls.type: cls for cls in (Subscribe, Unsubscribe, Ack)
}
_SERVER: Mapping[str, type[Hello | Event | Position | Loading | Refused]] = {
    Hello.type: Hello,
    Status.type: Status,
    Save.type: Save,
    Log.type: Log,
    Tokens.type: Tokens,
    Position.type: Position,
    Loading.type: Loading,
    Refused.type: Refused,
}


def _event(event: Event) -> dict[str, Any]:
    return {"job": event.job, "seq": event.seq, "attempt": event.attempt}


def _read_event(fields: Fields) -> tuple[str, int, int]:
    return fields.job(), fields.whole("seq", 1, _MAX_SEQ), fields.whole("attempt", 0, _MAX_SEQ)


def encode(message: ClientMessage | Hello | Event | Position | Loading | Refused) -> bytes:
    """The message's frame."""
    if isinstance(message, Submit):
        return b"".join((_SUBMIT.pack(SUBMIT, bytes.fromhex(message.job), message.apart), message.body))
    body: bytes = msgpack.packb({"type": message.type, **message.to_plain()})
    return bytes([MESSAGE]) + body


def encode_chunk(job: str, seq: int, offset: int, data: Buffer) -> bytes:
    """A frame of raw bytes of save `seq`, from byte `offset` on."""
    return b"".join((_HEAD.pack(CHUNK, bytes.fromhex(job), seq, offset), data))


def chunks(
    job: str, seq: int, parts: Sequence[Buffer], offset: int = 0, size: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Frames of a save's bytes, in order, from `offset` on. None crosses from one part to the next.

    Args:
        parts: the bytes of the save's tensors, in order.
        size: most raw bytes of a frame, as the server's hello said.
    """
    start = 0
    for part in parts:
        view = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
        for low in range(max(offset - start, 0), view.nbytes, size):
            yield encode_chunk(job, seq, start + low, view[low : low + size])
        start += view.nbytes


def decode_client(frame: Buffer) -> ClientMessage:
    """What a client sent. Raises InvalidPayload."""
    kind, body = _split(frame, MESSAGE, SUBMIT)
    if kind == SUBMIT:
        if body.nbytes + 1 < _SUBMIT.size:
            raise InvalidPayload("a submission ends within its header")
        _, job, apart = _SUBMIT.unpack_from(frame)
        return Submit(job.hex(), apart, memoryview(frame)[_SUBMIT.size :])
    message: ClientMessage = _read(body, _CLIENT, longest=64, containers=64)
    return message


def decode_server(frame: Buffer) -> ServerMessage:
    """What a server sent; a chunk's data is a view into `frame`. Raises InvalidPayload."""
    kind, body = _split(frame, MESSAGE, CHUNK)
    if kind == MESSAGE:
        message: ServerMessage = _read(body, _SERVER, longest=_MAX_ITEMS, containers=_MAX_CONTAINERS)
        return message
    if body.nbytes + 1 < _HEAD.size:
        raise InvalidPayload("a chunk ends within its header")
    _, job, seq, offset = _HEAD.unpack_from(frame)
    return Chunk(job.hex(), seq, offset, memoryview(frame)[_HEAD.size :])


def _split(frame: Buffer, *kinds: int) -> tuple[int, memoryview]:
    if not isinstance(frame, (bytes, bytearray, memoryview)) or not len(frame):
        raise InvalidPayload("a frame is binary and not empty")
    view = memoryview(frame)
    if view[0] not in kinds:
        raise InvalidPayload(f"unknown kind of frame {view[0]}")
    return view[0], view[1:]


def _read(body: memoryview, classes: Mapping[str, type[Any]], *, longest: int, containers: int) -> Any:
    fields = Fields(unpack(body, longest=longest, containers=containers), "a message")
    name = fields.text("type", 32)
    if name not in classes:
        raise InvalidPayload(f"unknown message {name!r}")
    fields.what = f"a {name} message"
    message = classes[name].read(fields)
    fields.done()
    return message
