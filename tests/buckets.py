"""An S3 service for tests: moto's server, a process of its own, one for a session."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

import httpx
from interpose_server.processes import CHILD
from ports import free_port


@dataclass(frozen=True)
class S3:
    """A running service. Its keys are as good as any."""

    endpoint: str

    def env(self, endpoint: str | None = None) -> dict[str, str]:
        """What a process has to know to use it, perhaps by another way."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": "an-id",
            "AWS_SECRET_ACCESS_KEY": "not-to-be-shown",
            "AWS_REGION": "us-east-1",
        }

    def bucket(self) -> str:
        """Make one. Returns a URL within it."""
        name = f"tests-{uuid4().hex[:12]}"
        httpx.put(f"{self.endpoint}/{name}", trust_env=False, timeout=60).raise_for_status()
        return f"s3://{name}/some/folder"

    def list(self, url: str) -> list[str]:
        """Keys of all objects in a URL's bucket."""
        return self._values(url, "list-type=2", "Key")

    def uploads(self, url: str) -> list[str]:
        """Those that were begun in parts, and neither finished nor given up."""
        return self._values(url, "uploads", "UploadId")

    def _values(self, url: str, query: str, tag: str) -> list[str]:
        text = (
            httpx.get(f"{self.endpoint}/{url.split('/')[2]}?{query}", trust_env=False, timeout=60)
            .raise_for_status()
            .text
        )
        return [part.split(f"</{tag}>")[0] for part in text.split(f"<{tag}>")[1:]]


@contextmanager
def run_s3() -> Iterator[S3]:
    port = free_port()
    moto = "from moto.server import main; main()"
    command = [sys.executable, "-c", moto, "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(CHILD), str(os.getpid()), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    service = S3(f"http://127.0.0.1:{port}")
    try:
        for _ in range(2400):
            try:
                httpx.get(service.endpoint, trust_env=False, timeout=60)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield service
    finally:
        process.kill()
        process.wait()
