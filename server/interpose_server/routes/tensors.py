"""Attachments uploaded before the job that names them, in the user's own namespace."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response
from interpose.errors import InvalidPayload, NotFound
from interpose.graph.values import TensorSpec
from interpose.wire.fields import check_sha
from interpose.wire.protocol import DTYPE_HEADER, SHAPE_HEADER
from interpose.wire.tensors import spec_of

from .. import attachments, blob_keys
from ..auth import User
from ..blobs import Blobs, Writer
from ..limits import body_parts
from ..parts import Parts

router = APIRouter(prefix="/v1/tensors", tags=["tensors"])


@router.head("/{sha}", summary="Whether you have uploaded this tensor; if so it is kept longer")
async def head(request: Request, sha: str, user: User) -> Response:
    parts = Parts.of(request)
    key = blob_keys.tensor(user.user, check_sha(sha))
    if await parts.blobs.ask(lambda: parts.blobs.keep(key, parts.settings.queue_ttl_s)) is None:
        raise NotFound(f"no tensor {sha} of yours is here")
    return Response(status_code=200)


@router.put("/{sha}", status_code=201, summary="Upload a tensor's raw little-endian bytes")
async def put(
    request: Request,
    sha: str,
    user: User,
    dtype: Annotated[str, Header(alias=DTYPE_HEADER)],
    shape: Annotated[str, Header(alias=SHAPE_HEADER)] = "",
) -> Response:
    parts = Parts.of(request)
    key = blob_keys.tensor(user.user, check_sha(sha))
    spec = spec_of(dtype, shape)
    parts.settings.limits.check("attachment_bytes", spec.nbytes)
    if await parts.blobs.ask(lambda: parts.blobs.keep(key, parts.settings.queue_ttl_s)) is not None:
        return Response(status_code=200)
    size = len(attachments.head(spec)) + spec.nbytes
    writer = await parts.blobs.ask(lambda: parts.blobs.writer(key, size, parts.settings.queue_ttl_s))
    try:
        await _receive(request, parts.blobs, writer, spec, sha)
        await parts.blobs.run(writer.commit)
    finally:
        await parts.blobs.ask(writer.close)
    return Response(status_code=201)


async def _receive(request: Request, blobs: Blobs, writer: Writer, spec: TensorSpec, sha: str) -> None:
    """Write the body behind its head, checking size, digest and the bytes of bools as they pass."""
    first = attachments.head(spec)
    digest = hashlib.sha256(first)
    writer.write(first)
    seen = 0
    async for part in body_parts(request, spec.nbytes, "attachment_bytes"):
        seen += len(part)
        if spec.dtype == "bool" and part.translate(None, b"\0\1"):
            raise InvalidPayload("a bool tensor holds bytes other than 0 and 1")
        await blobs.run(partial(_write, writer, digest, part))
    if seen != spec.nbytes:
        raise InvalidPayload(f"{seen:,} bytes came for a tensor of {spec.nbytes:,}")
    if digest.hexdigest() != sha:
        raise InvalidPayload("the bytes, dtype and shape don't have the SHA-256 they were sent under")


def _write(writer: Writer, digest: hashlib._Hash, part: bytes) -> None:
    digest.update(part)
    writer.write(part)
