"""The engine on a split model's home: generations that others join and leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import InterposeError
from interpose.graph.model import Graph
from interpose.runtime.engine import Engine, EngineJob
from interpose.runtime.loading import Loaded
from models import tiny
from recording import Kept, recorded
from splitting import split


class Company:
    """Jobs that come at given steps."""

    def __init__(self, joining: dict[int, list[EngineJob]]) -> None:
        self.joining = joining
        self.step = 0
        self.ends: list[tuple[int, InterposeError | None]] = []

    def due(self) -> bool:
        return False

    def pause(self, *, joinable: bool) -> None:
        self.step += 1
        assert joinable

    def arrivals(self) -> Sequence[EngineJob]:
        return self.joining.pop(self.step, [])

    def ended(self, job: EngineJob, error: InterposeError | None) -> None:
        self.ends.append((self.step, error))


def generation(model: LanguageModel, rows: list[list[int]], new: int, **options: Any) -> Graph:
    def fill(tracer: Any) -> None:
        with tracer.all():
            model.output[:, -1].save()
        tracer.result.save()

    return recorded(model.generate(rows, max_new_tokens=new, **options), fill)


def at_home(loaded: Loaded, home: torch.nn.Module) -> Loaded:
    modules = {path: module for path, module in home.named_modules() if path in loaded.modules}
    return replace(loaded, model=home, modules=modules, names={module: path for path, module in modules.items()})


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_rows_join_and_leave_a_cache_that_lies_on_shards(arch: str) -> None:
    model = LanguageModel(str(tiny(arch)))
    whole = model._access.local.engine
    graphs = [
        generation(model, [[5, 9, 33], [7]], 14),
        generation(model, [[3, 4, 5, 6, 7, 8, 9]], 3),
        generation(model, [[11, 12]], 6, do_sample=True, seed=5),
        generation(model, [[40] * 20], 4),
    ]
    with split(whole.loaded.model, 2) as parts:
        parts.home(torch.tensor([[1, 2]]))
        engine = Engine(at_home(whole.loaded, parts.home))
        for on in (whole, engine):
            sinks = [Kept() for _ in graphs]
            jobs = [EngineJob(graph, {}, sink) for graph, sink in zip(graphs, sinks, strict=True)]
            company = Company({3: jobs[2:3], 5: jobs[3:]})
            on.host(jobs[:2], company)
            assert [error for _, error in company.ends] == [None] * 4
            found = [sink.values for sink in sinks] + [company.ends]
            if on is whole:
                expected = found
        _same(found, expected)


def _same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _same(one, other)
    else:
        assert found == expected
