"""Every kind of blob, and how it is named."""

from __future__ import annotations

from .blobs import BlobKey


def payload(user: str, digest: str) -> BlobKey:
    """A job's graph, by the SHA-256 of the request it came in."""
    return BlobKey(user, "payload", digest)


def tensor(user: str, sha: str) -> BlobKey:
    """An attachment."""
    return BlobKey(user, "tensor", sha)


def result(user: str, name: str) -> BlobKey:
    """A save, by "<job>/<attempt>/<node>"."""
    return BlobKey(user, "result", name)


def tokenizer(sha: str) -> BlobKey:
    """A model's tokenizer.json."""
    return BlobKey("", "tokenizer", sha)
