"""A job's values on their way between sites, and what a shard reports of a job, as nests that can travel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import InterposeError, from_wire
from ...graph.model import Node
from ..interpreter import Interpreter
from ..skipped import ABSENT, SKIPPED, NoValue
from .route import Mail, Nest

SPENT = "spent"
"""In the place of a node in the address of mail: what the job has used by now, for whoever works for it next."""

_NO_VALUE: Mapping[str, NoValue] = {"skipped": SKIPPED, "absent": ABSENT}


def letters(job: Interpreter, number: int, sent: Mapping[int, Sequence[int]]) -> list[Mail]:
    """What a job has made for other sites since it was last asked; `sent`: node -> those that need it."""
    posted, job.posted = job.posted, []
    return [Mail(to, (number, node), _packed(value, marks)) for node, value, marks in posted for to in sent[node]]


def deliver(job: Interpreter, mail: Mail, only: frozenset[int] | None = None) -> None:
    """Give a job a value that came for it; with `only`, what isn't in it stays ready."""
    _, node = mail.address
    value = mail.value
    name = value.get("none")
    job.arrived(node, value["value"] if name is None else _NO_VALUE[name], (value["holed"], value["mask"]), only)


def _packed(value: Any, marks: tuple[bool, Any]) -> Nest:
    holed, mask = marks
    noted = {"holed": holed, "mask": mask}
    if isinstance(value, NoValue):
        return {"none": next(name for name, no in _NO_VALUE.items() if no is value), **noted}
    return {"value": value, **noted}


def spent_letters(job: Interpreter, number: int, sites: Iterable[int]) -> list[Mail]:
    """What a job has used, for those it may come to next; none while it has used nothing that is counted so."""
    told = job.spent.told
    return [Mail(site, (number, SPENT), told) for site in sites] if told else []


def of_spent(mail: Mail) -> bool:
    return bool(mail.address[1] == SPENT)


def error_to_nest(error: InterposeError | None) -> Nest:
    return None if error is None else error.to_wire()


def error_from_nest(nest: Nest, nodes: Sequence[Node]) -> InterposeError | None:
    """The error with the user's line, which doesn't travel."""
    if nest is None:
        return None
    node = nest.get("node")
    known = isinstance(node, int) and 0 <= node < len(nodes)
    return from_wire(nest, nodes[node].source if known else None)


def by_job(mail: Iterable[Mail]) -> dict[int, list[Mail]]:
    """Mail by the number of the job that it is for, in order."""
    found: dict[int, list[Mail]] = {}
    for one in mail:
        found.setdefault(one.address[0], []).append(one)
    return found
