"""Running graphs on a server: submit, wait, list."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .catalog import fetch_manifest, fetch_models, fetch_tokenizer
from .config import endpoint
from .errors import BadArgument
from .graph.model import Graph
from .job import Job, JobInfo, remember, transport_to
from .progress import Progress
from .transports.base import Transport
from .wire.stream import Happening, NewTokens
from .wire.submission import Batching, Submission
from .wire.tensors import Encoded, encode_tensor


def run_remote(
    graph: Graph,
    model: str,
    attachments: Mapping[str, Any],
    *,
    revision: str | None = None,
    batching: Batching = "auto",
    timeout: float | None = None,
    host: str | None = None,
    api_key: str | None = None,
    on_event: Callable[[Happening], None] | None = None,
    on_tokens: Callable[[NewTokens], None] | None = None,
    transport: Transport | None = None,
) -> dict[int, Any]:
    """Run a graph and wait for its saved values, by node id. Ctrl-C cancels the job.

    Args:
        model: the name the server serves it under.
        attachments: content id -> tensor or array, for all that the graph names.
        revision: the manifest's revision the graph was recorded against; None takes what is served.
        batching: "exclusive" to share the forward with nobody.
        timeout: seconds it may run; the server's own limit holds besides.
        host, api_key: the server; `CONFIG`'s by default.
        on_event: told of each event in this thread, instead of the progress line.
        on_tokens: told of each step of a generation that streams.
        transport: where to run it, instead of a server.

    Raises:
        InterposeError: as the job's, or the connection's.
    """
    job, submission, encoded = _prepare(
        graph, model, attachments, revision, batching, timeout, host, api_key, transport
    )
    job.begin(submission, encoded)
    try:
        if on_event is not None:
            told = on_event
            job.wait(lambda event: None if event is None else told(event))
        else:
            with Progress() as progress:
                job.wait(progress.show if on_tokens is None else _both(progress.show, on_tokens))
    except BaseException:
        # Whatever ended the wait, nobody will ask for this job again.
        job.interrupt()
        raise
    values = job.values()
    job.release()
    return values


def submit_remote(
    graph: Graph,
    model: str,
    attachments: Mapping[str, Any],
    *,
    revision: str | None = None,
    batching: Batching = "auto",
    timeout: float | None = None,
    host: str | None = None,
    api_key: str | None = None,
    transport: Transport | None = None,
) -> Job:
    """Hand a graph in and go on; arguments as of `run_remote`. Raises InterposeError if it isn't accepted."""
    job, submission, encoded = _prepare(
        graph, model, attachments, revision, batching, timeout, host, api_key, transport
    )
    job.submit(submission, encoded)
    return job


def jobs(*, host: str | None = None, api_key: str | None = None) -> list[JobInfo]:
    """The jobs of this key that the server still knows, as it lists them."""
    from .transports.http import body_of
    from .transports.remote import get

    server = endpoint(host, api_key)
    plain = body_of(get(server, "/v1/jobs"))
    return [
        JobInfo.from_plain(item, server) for item in (plain.get("jobs", []) if isinstance(plain, dict) else plain)
    ]


def _prepare(
    graph: Graph,
    model: str,
    attachments: Mapping[str, Any],
    revision: str | None,
    batching: Batching,
    timeout: float | None,
    host: str | None,
    api_key: str | None,
    transport: Transport | None,
) -> tuple[Job, Submission, Mapping[str, Encoded]]:
    encoded = {sha: encode_tensor(attachments[sha]) for sha in graph.attachments if sha in attachments}
    if missing := graph.attachments.keys() - encoded.keys():
        raise BadArgument(f"{len(missing)} tensors the graph names aren't among the attachments")
    submission = Submission(uuid.uuid4().hex, model, graph, revision=revision, batching=batching, timeout_s=timeout)
    if transport is not None:
        return Job(submission.id, model, partial(_given, transport), graph=graph), submission, encoded
    server = endpoint(host, api_key)
    job = Job(submission.id, model, partial(transport_to, server), graph=graph)
    remember(server, job)
    return job, submission, encoded


def _both(
    show: Callable[[Happening | None], None], on_tokens: Callable[[NewTokens], None]
) -> Callable[[Happening | None], None]:
    def tell(event: Happening | None) -> None:
        show(event)
        if isinstance(event, NewTokens):
            on_tokens(event)

    return tell


def _given(transport: Transport) -> Transport:
    return transport


__all__ = [
    "Job",
    "JobInfo",
    "fetch_manifest",
    "fetch_models",
    "fetch_tokenizer",
    "jobs",
    "run_remote",
    "submit_remote",
]
