"""The page a browser finds at the root."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from ..broker.failures import SENTENCES
from ..broker.models import Hosted
from ..broker.states import ModelState
from ..parts import Parts

router = APIRouter(include_in_schema=False)

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Interpose</title>
<style>body {{ font: 16px/1.5 system-ui; margin: 3rem auto; max-width: 44rem; padding: 0 1rem }}
td, th {{ padding: .2rem 1.5rem .2rem 0; text-align: left }} code, pre {{ background: #8882; padding: .1rem .3rem }}
pre {{ padding: .8rem; overflow: auto }}</style>
<h1>Interpose</h1>
<table><tr><th>model<th>state<th>a shared forward<th>a batch</tr>{rows}</table>
<pre>from interpose import CONFIG, LanguageModel

CONFIG.HOST, CONFIG.API_KEY = "{host}", "ip_..."
model = LanguageModel("{model}")
with model.trace("The capital of France is", remote=True):
    logits = model.output.save()</pre>
<p>Keys come from whoever runs this server. The HTTP interface is described at <a href="/docs">/docs</a>.</p>
</html>
"""


@router.get("/", response_class=HTMLResponse)
async def status(request: Request) -> str:
    """It may be a second old, as anybody may ask. Where keys are for some models only, it names none."""
    found = await Parts.of(request).reached()
    hosted = found.models if found.named else ()
    rows = "".join(
        f"<tr><td>{escape(model.name)}<td>{escape(_state(model))}{_budget(model.budget)}</tr>" for model in hosted
    )
    none = (
        f"{len(found.models)}, of which {found.ready} run jobs; /v1/models names yours"
        if found.models
        else "none yet"
    )
    return _PAGE.format(
        rows=rows or f"<tr><td colspan=4>{none}</tr>",
        host=escape(str(request.base_url).rstrip("/")),
        model=escape(hosted[0].name if hosted else "org/name"),
    )


def _state(model: Hosted) -> str:
    """With how many copies there are of several, or why there is none."""
    copies = model.count(ModelState.READY)
    if model.state is ModelState.FAILED and model.failure is not None:
        return f"failed: {SENTENCES[model.failure.reason]}"
    return f"{model.state} ({copies} copies)" if copies > 1 else str(model.state)


def _budget(told: Mapping[str, Any]) -> str:
    """What several jobs may share, as the worker measured it."""
    if not told:
        return "<td><td>"
    return (
        f"<td>up to {told['forward_tokens']:,} tokens, {told['batch_s']:g} s"
        f"<td>up to {told['batch_jobs']} jobs, {told['batch_mb']:,} MB"
    )
