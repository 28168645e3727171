"""Jobs: submit, look, list, cancel, fetch the result."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from interpose.errors import from_wire
from interpose.wire.fields import check_job
from interpose.wire.status import JobStatus

from ..auth import User
from ..downloads import download
from ..limits import read_body
from ..parts import Parts
from ..results import Results
from ..submit import submit

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post("", status_code=202, summary="Submit a job: msgpack, or JSON with base64 attachments")
async def post(request: Request, user: User) -> Response:
    parts = Parts.of(request)
    body = await read_body(request, parts.settings.limits.payload_bytes, "payload_bytes")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    job, status, place = await submit(parts, user, body, kind)
    return JSONResponse({"id": job.id, "status": str(status), "position": place}, 202)


@router.get("", summary="Your jobs, newest first")
async def list_jobs(request: Request, user: User) -> dict[str, list[dict[str, Any]]]:
    found = await Parts.of(request).broker.queue.list(user.user)
    return {"jobs": [info.to_plain() for info in found]}


@router.get("/{job}", summary="One job's state; while it waits its place in the queue and its model's state")
async def get(request: Request, job: str, user: User) -> dict[str, Any]:
    parts = Parts.of(request)
    queue = parts.broker.queue
    info = await queue.info(user.user, check_job(job))
    plain = {**info.to_plain(), "position": await queue.place(info)}
    if info.status is JobStatus.QUEUED:
        plain["model_state"] = (await parts.broker.models.get(info.model)).told
    return plain


@router.delete("/{job}", summary="Cancel a job; nothing happens to one that has ended")
async def delete(request: Request, job: str, user: User) -> dict[str, Any]:
    info = await Parts.of(request).broker.queue.cancel(user.user, check_job(job))
    return info.to_plain()


@router.get("/{job}/saves/{event}", summary="The bytes of the save that an event announced", response_model=None)
async def save(
    request: Request,
    job: str,
    event: Annotated[int, Path(ge=1, lt=1 << 32)],
    user: User,
    wanted: Annotated[str, Header(alias="Range")] = "",
) -> Response:
    return await download(Parts.of(request), user.user, check_job(job), event, wanted)


@router.get("/{job}/result", summary="All saves of a completed job; 202 while it isn't over", response_model=None)
async def result(
    request: Request, job: str, user: User, format: Literal["safetensors", "msgpack"] = "safetensors"
) -> Response:
    parts = Parts.of(request)
    info = await parts.broker.queue.info(user.user, check_job(job))
    if not info.status.terminal:
        return JSONResponse(info.to_plain(), 202, {"Retry-After": "1"})
    if info.status is not JobStatus.COMPLETED:
        raise from_wire(info.error or {})
    results = await Results.of(parts, user.user, job, info.attempt)
    if format == "safetensors":
        kind, size, stream = "application/vnd.safetensors", *results.safetensors()
    else:
        kind, size, stream = "application/msgpack", *results.msgpack()
    return StreamingResponse(stream, media_type=kind, headers={"Content-Length": str(size)})
