"""Graphs made ready to run: checked and compiled once for all that differ in prompts and attached values alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from threading import Lock
from typing import NamedTuple

import torch

from ..graph.limits import Limits
from ..graph.manifest import Manifest
from ..graph.model import Graph
from ..graph.structure import structure, weight
from ..graph.validate import Report, check_run, validate
from .plan import Plan, compile_graph

MOST = 1 << 18
"""What all graphs that are kept may weigh, some 40 MB as measured; one alone an eighth."""


class Prepared(NamedTuple):
    """A graph that may run.

    Attributes:
        attachments: by the names under which the plan's graph knows them.
    """

    plan: Plan
    report: Report
    attachments: Mapping[str, torch.Tensor]


class Preparation:
    """Prepares graphs for one model and keeps what it found, the most recent first to stay. From any thread."""

    def __init__(self, manifest: Manifest, most: int = MOST) -> None:
        self._manifest = manifest
        self._most = most
        self._kept: OrderedDict[Hashable, tuple[Plan, Report, int]] = OrderedDict()
        self._weight = 0
        self._lock = Lock()

    def __call__(
        self,
        graph: Graph,
        attachments: Mapping[str, torch.Tensor],
        limits: Limits,
        owner: str,
        report: Report | None,
    ) -> Prepared:
        """The graph ready to run.

        Args:
            owner: whose it is; what was found for one owner serves no other, or its speed would tell of it.
            report: what validation found, if it was done.

        Raises:
            GraphError, LimitExceeded: it can't run.
        """
        shape = structure(graph)
        if shape is None:
            return Prepared(compile_graph(graph), report or validate(graph, self._manifest, limits), attachments)
        key = owner, limits, shape
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        if found is None:
            report = report or validate(graph, self._manifest, limits)
            plan = compile_graph(graph.renamed(_names(graph)))
            self._keep(key, plan, report)
        else:
            plan, report, _ = found
            for run in graph.runs:
                check_run(run, self._manifest, graph.attachments)  # token ids are this graph's own
            plan = plan.of(graph.runs)
        names = _names(graph)
        return Prepared(
            plan, report, {names[name]: tensor for name, tensor in attachments.items() if name in names}
        )

    def _keep(self, key: Hashable, plan: Plan, report: Report) -> None:
        size = weight(plan.graph)
        if size > self._most // 8:
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = plan.of(()), report, size  # nobody's tokens are kept
            self._weight += size
            while self._weight > self._most:
                _, (_, _, gone) = self._kept.popitem(last=False)
                self._weight -= gone


def _names(graph: Graph) -> dict[str, str]:
    """Attachments by their place: equal structures name them alike."""
    return {name: str(place) for place, name in enumerate(graph.attachments)}
