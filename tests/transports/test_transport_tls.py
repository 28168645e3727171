"""Whose certificates a client believes: also on this machine, where proxies of the environment are passed over."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from interpose.config import Endpoint
from interpose.errors import ConnectionFailed
from interpose.transports.http import Http
from interpose.wire.protocol import HEADER, PROTOCOL

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")


class Empty(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.send_header(HEADER, str(PROTOCOL))
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A certificate of `localhost` that nobody has heard of; its key lies beside it."""
    path, key = tmp_path / "own.crt", tmp_path / "own.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture
def address(signed: Path) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(signed, signed.with_suffix(".key"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://localhost:{server.server_port}"
        server.shutdown()


async def test_a_certificate_that_is_named_is_believed(
    address: str, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(signed))
    http = Http(Endpoint(address))
    assert (await http.request("GET", "/", patience=60)).content == b"{}"
    await http.close()


async def test_others_are_not(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    http = Http(Endpoint(address))
    with pytest.raises(ConnectionFailed, match="certificate verify failed"):
        await http.request("GET", "/", patience=0.1)
    await http.close()
