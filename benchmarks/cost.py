"""Processor time of each part of the system for one trace: hardly changed by what else the machine does."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

PARTS = {"interpose_server.worker": "worker", "interpose_server.gateway": "gateway", "valkey": "Valkey"}


def cpu(supervisor: int, work: Callable[[], object], times: int) -> dict[str, float]:
    """Seconds of processor time by part, this process being the client, for each call of `work`."""
    parts = processes(supervisor)
    before = {name: _spent(part) for name, part in parts.items()}
    own = time.process_time()
    for _ in range(times):
        work()
    found = {"client": time.process_time() - own}
    found |= {name: _spent(part) - before[name] for name, part in parts.items()}
    return {name: spent / times for name, spent in found.items()}


def processes(supervisor: int) -> dict[str, psutil.Process]:
    """The server's processes by part."""
    return {_name(child): child for child in psutil.Process(supervisor).children()}


def _name(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    return next((name for mark, name in PARTS.items() if mark in command), "other")


def _spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
