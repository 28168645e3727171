"""A scripted server on loopback: real HTTP, a real websocket, and faults on request."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from interpose.errors import InterposeError, NotFound, Unauthorized, UnknownJob
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.wire.messages import (
    Ack,
    Hello,
    Log,
    Refused,
    Save,
    Status,
    Submit,
    Subscribe,
    chunks,
    decode_client,
    encode,
)
from interpose.wire.protocol import HEADER, PROBLEM
from interpose.wire.status import JobStatus
from interpose.wire.submission import decode_submission
from interpose.wire.tensors import encode_tensor
from interpose.wire.trees import flatten
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

KEY = "secret"
GRAPH = Graph(
    runs=(Run(invokes=(Invoke(rows=((1, 2, 3),)),)),),
    nodes=(Node(0, "read", point=Point("h.0", "output"), invoke=0), Node(1, "save", args=(Ref(0),), invoke=0)),
)


@dataclass
class Lab:
    """Attributes:
    values: node -> value each job saves.
    ending: how each job ends.
    cuts: for each next connection, after how many frames it drops; none left: never.
    tamper: for each next connection, what happens to its frames before they leave; a function among them is
        waited for until it returns something.
    answers: to the next jobs that come over the websocket: a refusal; None: the connection closes.
    apart: whether saves come without their bytes for who asks so.
    faults: for each next fetch of a save, what becomes of it: after how many bytes it drops (None: never), or the
        answer to bytes and first byte.
    hold: while it is set, jobs stay queued.
    cold: to the next questions about models: a refusal.
    busy: how many of the next POSTs are taken, but answered by a broken proxy.
    """

    port: int = 0
    values: dict[int, Any] = field(default_factory=dict)
    ending: tuple[str, dict[str, Any] | None] = ("completed", None)
    cuts: list[int] = field(default_factory=list)
    tamper: list[Any] = field(default_factory=list)
    apart: bool = False
    faults: list[Any] = field(default_factory=list)
    fetched: list[tuple[int, int]] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    protocol: str = "1"
    chunk: int = 1 << 20
    busy: int = 0
    answers: list[InterposeError | None] = field(default_factory=list)
    jobs: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    asked: list[Subscribe] = field(default_factory=list)
    acked: list[str] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    models: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tokenizers: dict[str, bytes] = field(default_factory=dict)
    cold: list[InterposeError] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/jobs", self.post, methods=["POST"]),
                Route("/v1/jobs", self.list, methods=["GET"]),
                Route("/v1/jobs/{id}", self.job, methods=["GET", "DELETE"]),
                Route("/v1/jobs/{id}/saves/{seq:int}", self.saved),
                Route("/v1/tensors/{sha}", self.tensor, methods=["HEAD", "PUT"]),
                Route("/v1/models/{id:path}/tokenizer", self.tokenizer),
                Route("/v1/models/{id:path}", self.model),
                WebSocketRoute("/v1/stream", self.stream),
            ],
            exception_handlers={InterposeError: self.explain},
        )

    def answer(self, plain: Any, status: int = 200) -> Response:
        return JSONResponse(plain, status, {HEADER: self.protocol})

    async def explain(self, request: Request, error: InterposeError) -> Response:
        body = {"title": error.code, "status": error.status, "detail": error.message, **error.to_wire()}
        return JSONResponse(body, error.status, {HEADER: "1", "Retry-After": "7"}, PROBLEM)

    def note(self, request: Request) -> None:
        self.calls.append(f"{request.method} {request.url.path}")
        if request.headers.get("authorization") != f"Bearer {KEY}":
            raise Unauthorized("no such key")

    async def post(self, request: Request) -> Response:
        self.note(request)
        job = decode_submission(await request.body())
        self.jobs[job.id] = job
        if self.busy:
            self.busy -= 1
            return Response(status_code=502)
        return self.answer({"id": job.id, "status": "queued", "position": 1}, 202)

    def describe(self, job: str) -> dict[str, Any]:
        if job not in self.jobs:
            raise UnknownJob(f"no job {job}")
        return {
            "id": job,
            "model": self.jobs[job].model,
            "status": "running",
            "attempt": 1,
            "created_ms": 5,
            "x": 1,
        }

    async def list(self, request: Request) -> Response:
        self.note(request)
        return self.answer({"jobs": [self.describe(job) for job in self.jobs]})

    async def job(self, request: Request) -> Response:
        self.note(request)
        plain = self.describe(request.path_params["id"])
        if request.method == "DELETE":
            self.cancelled.add(plain["id"])
        return self.answer(plain)

    async def saved(self, request: Request) -> Response:
        self.note(request)
        seq = request.path_params["seq"]
        start = int(request.headers.get("range", "bytes=0-")[6:-1])
        self.fetched.append((seq, start))
        _, tensors = flatten(list(self.values.values())[seq - 3])
        data = b"".join(bytes(encode_tensor(tensor).data) for tensor in tensors)
        fault = self.faults.pop(0) if self.faults else None
        return fault(data, start) if callable(fault) else part_of(data, start, fault)  # type: ignore[no-any-return]

    async def tensor(self, request: Request) -> Response:
        self.note(request)
        sha = request.path_params["sha"]
        if request.method == "PUT":
            assert request.headers["interpose-dtype"] == "float32"
            assert request.headers["interpose-shape"]
            self.tensors[sha] = await request.body()
        if sha not in self.tensors:
            raise NotFound("no such tensor")
        return self.answer(None)

    async def model(self, request: Request) -> Response:
        self.note(request)
        if self.cold:
            raise self.cold.pop(0)
        tag, body = self.models[request.path_params["id"]]
        sent = {HEADER: "1", "ETag": f'"{tag}"'}
        if request.headers.get("if-none-match") == f'"{tag}"':
            return Response(status_code=304, headers=sent)
        return Response(body, headers=sent, media_type="application/msgpack")

    async def tokenizer(self, request: Request) -> Response:
        self.note(request)
        return Response(self.tokenizers[request.path_params["id"]], headers={HEADER: "1"})

    def frames(self, ask: Subscribe) -> Iterator[bytes]:
        """The job's whole conversation, from where it was asked."""
        head = [Status(ask.job, 1, 0, JobStatus.QUEUED), Status(ask.job, 2, 1, JobStatus.RUNNING)]
        yield from (encode(event) for event in head if event.seq > ask.after)
        seq = 2
        for node, value in self.values.items():
            seq += 1
            if seq <= ask.after:
                continue
            tree, tensors = flatten(value)
            parts = [encode_tensor(tensor) for tensor in tensors]
            apart = self.apart and 0 < ask.apart <= sum(part.data.nbytes for part in parts)
            yield encode(Save(ask.job, seq, 1, node, tree, tuple(part.spec for part in parts), apart))
            if apart:
                continue
            offset = ask.offset if seq == ask.after + 1 else 0
            yield from chunks(ask.job, seq, [part.data for part in parts], offset, self.chunk)
        yield encode(Log(ask.job, seq + 1, 1, 0, "logged"))
        status, error = self.ending
        if ask.job in self.cancelled:
            status, error = "cancelled", None
        yield encode(Status(ask.job, seq + 2, 1, JobStatus(status), error))

    async def stream(self, ws: WebSocket) -> None:
        self.calls.append("WS")
        if ws.headers.get("authorization") != f"Bearer {KEY}":
            error = Unauthorized("no such key")
            await ws.send_denial_response(JSONResponse(error.to_wire(), 401, {HEADER: "1"}, PROBLEM))
            return
        await ws.accept()
        await ws.send_bytes(encode(Hello(protocol=int(self.protocol), chunk_bytes=self.chunk)))
        left = self.cuts.pop(0) if self.cuts else None
        tamper = self.tamper.pop(0) if self.tamper else None
        senders: set[asyncio.Task[None]] = set()
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                message = decode_client(await ws.receive_bytes())
                if isinstance(message, Ack):
                    self.acked.append(message.job)
                if isinstance(message, Submit):
                    self.calls.append("SUBMIT")
                    answer = self.answers.pop(0) if self.answers else self
                    if isinstance(answer, InterposeError):
                        await ws.send_bytes(encode(Refused.of(answer, message.job)))
                        continue
                    if answer is None:
                        await ws.close(1011)
                        break
                    self.jobs[message.job] = decode_submission(bytes(message.body))
                    message = Subscribe(message.job, apart=message.apart)
                if not isinstance(message, Subscribe):
                    continue
                self.asked.append(message)
                senders.add(asyncio.create_task(self.send(ws, message, left, tamper)))
        for task in senders:
            task.cancel()

    async def send(self, ws: WebSocket, ask: Subscribe, left: int | None, tamper: Any) -> None:
        if ask.job not in self.jobs:
            await ws.send_bytes(encode(Refused.of(UnknownJob(f"no job {ask.job}"), ask.job)))
            return
        while self.hold.is_set() and ask.job not in self.cancelled:  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.01)
        frames = self.frames(ask)
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            for count, frame in enumerate(tamper(frames) if tamper else frames):
                if count == left:
                    await ws.close(1011)
                    return
                while callable(frame) and not frame():  # noqa: ASYNC110 - set by another request
                    await asyncio.sleep(0.01)
                if not callable(frame):
                    await ws.send_bytes(frame)


def part_of(
    data: bytes, start: int, drop: int | None = None, stall: bool = False, gone: threading.Event | None = None
) -> Response:
    """The bytes from `start` on; after `drop` of them the connection breaks, or with `stall` nothing more comes.

    `gone` is set when all but the last few of them have left.
    """

    async def body() -> AsyncIterator[bytes]:
        yield data[start : None if drop is None else start + drop]
        if gone is not None:
            gone.set()
        if stall:
            await asyncio.sleep(60)
        if drop is not None:
            raise ConnectionError("as told")

    sent = {HEADER: "1", "Content-Length": str(len(data) - start)}
    if start:
        sent["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return StreamingResponse(body(), 206 if start else 200, sent)


@contextlib.contextmanager
def serving(lab: Lab, port: int = 0) -> Iterator[Lab]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        lab.port = listener.getsockname()[1]
        options = uvicorn.Config(
            lab.app(), log_level="critical", ws="websockets-sansio", lifespan="off", timeout_graceful_shutdown=0
        )
        server = uvicorn.Server(options)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield lab
        finally:
            server.should_exit = True
            thread.join()
