"""A server that does nothing, on the libraries ours is built of: what the stack itself costs.

POST /job is answered, and one message sent on /stream; a message on /stream, a number of 8 bytes, is answered by so
many bytes in frames of 1 MB; whoever sends one to the second port gets the same bytes with nothing around them. Run
as a script, it prints both ports.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
import uvloop
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, Response

FRAME = 1 << 20


def asked(size: int) -> bytes:
    """A message that asks for so many bytes, whole frames of them."""
    return size.to_bytes(8)


@contextmanager
def reference() -> Iterator[tuple[int, int]]:
    """The server in a process of its own. Yields its ports: HTTP, then plain TCP."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    try:
        http, tcp = process.stdout.readline().split()
        yield int(http), int(tcp)
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


async def serve() -> None:
    app = FastAPI()
    messages: asyncio.Queue[bytes] = asyncio.Queue()
    frame = bytes(FRAME)

    @app.post("/job")
    async def job(request: Request) -> Response:
        messages.put_nowait(await request.body())
        return JSONResponse({"status": "queued"}, 202)

    @app.websocket("/stream")
    async def stream(websocket: WebSocket) -> None:
        await websocket.accept()
        told = asyncio.create_task(tell(websocket))
        try:
            while size := await websocket.receive_bytes():
                for _ in range(int.from_bytes(size) // FRAME):
                    await websocket.send_bytes(frame)
        except WebSocketDisconnect:
            told.cancel()

    async def tell(websocket: WebSocket) -> None:
        while True:
            await websocket.send_bytes(await messages.get())

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while size := await reader.read(8):
            for _ in range(int.from_bytes(size) // FRAME):
                writer.write(frame)
                await writer.drain()
        writer.close()

    bound = socket.create_server(("127.0.0.1", 0))
    tcp = await asyncio.start_server(plain, "127.0.0.1", 0)
    config = uvicorn.Config(
        app, http="httptools", ws="websockets-sansio", ws_per_message_deflate=False, log_config=None
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[bound]))
    print(bound.getsockname()[1], tcp.sockets[0].getsockname()[1], flush=True)
    # The parent closes our input, or dies: either way we end.
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    tcp.close()
    await task


if __name__ == "__main__":
    uvloop.run(serve())
