import io
import sys
from types import ModuleType

import pytest
from interpose.config import CONFIG
from interpose.progress import Progress, bar
from interpose.wire.result import Saved
from interpose.wire.status import JobStatus
from interpose.wire.stream import Changed, Logged, ModelState, Moved, Received

EVENTS = [
    Changed(JobStatus.QUEUED, 0),
    Moved(3),
    Moved(1),
    Changed(JobStatus.RUNNING, 1),
    Received(1, 16_000_000, 64_000_000),
    Saved(1, None, (), ()),
    Changed(JobStatus.QUEUED, 1),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("interpose.progress._PATIENCE_S", 0.0)
    monkeypatch.setattr("interpose.progress._EVERY_S", 0.0)
    monkeypatch.setattr(CONFIG, "PROGRESS", True)


def show(*events):
    with Progress() as progress:
        for event in events:
            progress.show(event)


def test_a_terminal_gets_one_line_that_goes_away(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    show(*EVENTS)
    drawn = [text.removeprefix("interpose: ") for text in terminal.getvalue().split("\r\x1b[2K")[1:]]
    assert drawn == [
        "queued",
        "queued, 2 ahead",
        "queued, next",
        "running",
        "receiving [######------------------] 16.0 of 64.0 MB",
        "running, 1 value received",
        "queued again: its worker was lost",
        "",
    ]
    assert "\n" not in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_a_model_that_has_to_be_loaded_is_named_as_what_is_waited_for(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    queued = Changed(JobStatus.QUEUED, 0)
    show(queued, ModelState("cold"), Moved(2), ModelState("loading"), ModelState("ready"), Moved(1))
    drawn = [text.removeprefix("interpose: ") for text in terminal.getvalue().split("\r\x1b[2K")[1:]]
    assert drawn == [
        "queued",
        "queued; its model is cold and being loaded, 0 s",
        "queued, 1 ahead; its model is cold and being loaded, 0 s",
        "queued, 1 ahead; its model is being loaded, 0 s",
        "queued, 1 ahead",
        "queued, next",
        "",
    ]


def test_logs_are_the_users_own_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    show(EVENTS[0], Logged(1, "hello"))
    assert capsys.readouterr().out == "hello\n"
    assert terminal.getvalue().endswith("\x1b[2K")


def test_nobody_looking_nothing_shown(monkeypatch, capsys):
    show(*EVENTS)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    CONFIG.PROGRESS = False
    try:
        show(*EVENTS)
    finally:
        CONFIG.PROGRESS = None
    assert terminal.getvalue() == capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", None)
    show(*EVENTS)


def test_short_jobs_show_nothing(monkeypatch):
    monkeypatch.setattr("interpose.progress._PATIENCE_S", 60.0)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    show(*EVENTS)
    assert terminal.getvalue() == ""


def test_a_closed_terminal_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress() as progress:
        terminal.close()
        for event in EVENTS:
            progress.show(event)


def test_a_notebook_gets_one_output(monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return Handle()

    ipython, parts = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = type("ZMQInteractiveShell", (), {})
    parts.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", parts)
    show(EVENTS[0], EVENTS[1])
    assert shown == ["interpose: queued", "interpose: queued, 2 ahead", ""]


def test_bars():
    assert bar(0, 0) == "[------------------------] 0.0 of 0.0 MB"
    assert bar(5, 5).startswith("[" + "#" * 24 + "]")
