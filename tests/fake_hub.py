"""A hub on loopback: repositories out of folders, gated ones, and nothing else. Counts what is asked of it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + 34 * "0"


@dataclass
class Hub:
    """Attributes:
    repos: id -> folder with its files, at the revision "main" and the commit `COMMIT`.
    gated: ids that are given to nobody.
    asked: how often each repository was asked for anything.
    """

    repos: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    url: str = ""


class _Answers(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        parts = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        repo, verb = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
        self.hub.asked[repo] += 1
        folder = self.hub.repos.get(repo)
        file = folder.joinpath(*parts[4:]) if folder is not None and verb == "resolve" else None
        if repo in self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif folder is None:
            self._refuse(404, "RepoNotFound")
        elif verb in ("resolve", "revision", "tree") and parts[3] not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif verb == "revision":
            self._give(json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(), body)
        elif verb == "tree":
            files = [(file.name, file.stat().st_size) for file in folder.iterdir()]
            tree = [{"type": "file", "path": name, "size": size, "oid": ""} for name, size in files]
            self._give(json.dumps(tree).encode(), body)
        elif file is None or not file.is_file():
            self._refuse(404, "EntryNotFound")
        else:
            self._give(file.read_bytes(), body)

    def _give(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        for name, value in (
            ("Content-Length", str(len(data))),
            ("ETag", f'"{hashlib.sha256(data).hexdigest()}"'),
            ("X-Repo-Commit", COMMIT),
        ):
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        if code != "RepoNotFound":
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving_hub(hub: Hub) -> Iterator[Hub]:
    """The hub until the block is left; HF_ENDPOINT is `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
