"""The kinds of graph that many clients or jobs are measured with. Needs nothing but a model being traced."""

from __future__ import annotations

from typing import Any

KINDS = 4


def fill(model: Any, block: Any, index: int) -> None:
    """One of several kinds of intervention at a block of a Llama."""
    match index % KINDS:
        case 0:
            block.output[0][0, -1].save()
        case 1:
            block.output[0][:, -1] *= 1.5
        case 2:
            block.mlp.output[:] = 0
        case _:
            model.lm_head(model.model.norm(block.output[0][:, -1])).argmax(dim=-1).save()
