"""Whether Prometheus has what the dashboard draws and the alerts ask for."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

from machine import ROOT, say
from stack import Stack, until

FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"


def ask(stack: Stack, path: str, **query: str) -> Any:
    """An answer of Prometheus, asked from the gateway's container: it isn't to be reached from outside."""
    url = f"http://prometheus:9090/api/v1/{path}?{urllib.parse.urlencode(query)}"
    answer = json.loads(stack.exec("gateway", "python", "-c", FETCH, url))
    assert answer["status"] == "success", answer
    return answer["data"]


def expressions() -> dict[str, str]:
    """The dashboard's: what is asked -> the panel that draws it."""
    board = json.loads((ROOT / "deploy/monitoring/grafana/interpose.json").read_text())
    drawn = {target["expr"]: panel["title"] for panel in board["panels"] for target in panel["targets"]}
    filled = {"$model": ".*", "$__rate_interval": "1m"}
    for name, value in filled.items():
        drawn = {expr.replace(name, value): title for expr, title in drawn.items()}
    return drawn


def check(stack: Stack) -> None:
    """Raises AssertionError for an alert that Prometheus can't evaluate or a panel that would stay empty."""
    until("a scrape", lambda: ask(stack, "query", query="rate(interpose_ended_jobs[1m])")["result"], 120)
    ended = ask(stack, "query", query="sum by (outcome) (max by (model, outcome) (interpose_ended_jobs))")["result"]
    say(f"Prometheus counts jobs ended: { {row['metric']['outcome']: row['value'][1] for row in ended} }")
    drawn = expressions()
    empty = {title for expr, title in drawn.items() if not ask(stack, "query", query=expr)["result"]}
    say(f"  of the dashboard's {len(drawn)} queries, empty: {', '.join(sorted(empty)) or 'none'}")
    assert not empty, empty
    (group,) = ask(stack, "rules")["groups"]
    unwell = {rule["name"]: rule["lastError"] for rule in group["rules"] if rule["health"] == "err"}
    say(f"  of {len(group['rules'])} alerts, not evaluated: {', '.join(unwell) or 'none'}")
    assert not unwell, unwell
