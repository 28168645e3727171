"""One line that says how a job is doing: on a terminal's stderr, or under the notebook's cell. Stdout is left
to the user's own prints."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any, Protocol

from .config import CONFIG
from .wire.result import Saved
from .wire.status import JobStatus
from .wire.stream import Changed, Happening, Logged, ModelState, Moved, Received

_PATIENCE_S = 0.25
"""Jobs that are over sooner show nothing."""

LOADING = {
    "cold": "is cold and being loaded",
    "crowded": "waits for a free device",
    "loading": "is being loaded",
    "draining": "is being moved",
    "failed": "couldn't be loaded; that is tried again",
}
"""By its state, what the model does that a job waits for. One in any other state is there, or won't be."""

_EVERY_S = 0.1
_BAR = 24


class _Display(Protocol):
    def draw(self, text: str) -> None: ...
    def clear(self) -> None: ...


class _Terminal:
    """Rewrites the last line of stderr."""

    def draw(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[2K{text}")
        sys.stderr.flush()

    def clear(self) -> None:
        self.draw("")


class _Notebook:
    """Rewrites one output of the cell that waits."""

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handle: Any = None

    def draw(self, text: str) -> None:
        data = {"text/plain": text}
        if self._handle is None:
            self._handle = self._display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def clear(self) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)


class Progress:
    """Shows what `show` is told while its `with` block lasts, and leaves nothing behind.

    Does nothing if `CONFIG.PROGRESS` is False or there is nobody to see it.
    """

    def __init__(self) -> None:
        self._display = _find() if CONFIG.PROGRESS else None
        self._text = "submitting"
        self._model: tuple[str, str, float] | None = None
        """What is waited for, what it does, and since when."""
        self._saved = 0
        self._drawn = ""
        self._due = time.monotonic() + _PATIENCE_S

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None and self._drawn:
            self._draw("")

    def show(self, event: Happening | None) -> None:
        """Take note of an event; None means that a moment passed without one."""
        if isinstance(event, Logged):
            self._log(event)
        elif isinstance(event, ModelState):
            self._wait_for(f"{self._text}; its model", event.state)
        elif event is not None:
            self._text = self._describe(event)
        self._update()

    def loading(self, model: str, state: str) -> None:
        """Before there is a job: what is known of a model has to wait for it."""
        self._wait_for(model, state)
        self._update()

    @property
    def seen(self) -> bool:
        """Whether there is somebody to see it."""
        return self._display is not None

    def _wait_for(self, what: str, state: str) -> None:
        since = self._model[2] if self._model is not None else time.monotonic()
        told = LOADING.get(state)
        self._model = None if told is None else (what, told, since)

    def _update(self) -> None:
        text = self._text
        if self._model is not None:
            what, does, since = self._model
            text = f"{what} {does}, {time.monotonic() - since:.0f} s"
        if self._display is not None and time.monotonic() >= self._due and text != self._drawn:
            self._draw(text)
            self._due = time.monotonic() + _EVERY_S

    def _describe(self, event: Happening) -> str:
        match event:
            case Moved():
                place = "queued, next" if event.position <= 1 else f"queued, {event.position - 1} ahead"
                if self._model is not None:
                    self._model = f"{place}; its model", *self._model[1:]
                return place
            case Received():
                return f"receiving {bar(event.received, event.nbytes)}"
            case Saved():
                self._saved += 1
                return f"running, {self._saved} value{'s' if self._saved > 1 else ''} received"
            case Changed(status=JobStatus.QUEUED, attempt=attempt) if attempt > 0:
                self._saved = 0
                return "queued again: its worker was lost"
            case Changed():
                self._model = None if event.status is not JobStatus.QUEUED else self._model
                return str(event.status)
        return self._text

    def _draw(self, text: str) -> None:
        """A display that fails must not take the job's result with it."""
        assert self._display is not None
        try:
            if text:
                self._display.draw(f"interpose: {text}")
            else:
                self._display.clear()
            self._drawn = text
        except (OSError, ValueError):
            self._display = None

    def _log(self, event: Logged) -> None:
        """What the user's graph prints goes where a local run's prints go."""
        if self._display is not None and self._drawn:
            self._draw("")
        print(event.text)


def bar(done: int, whole: int) -> str:
    """As in "[######------------------] 16.0 of 64.0 MB"."""
    filled = _BAR * done // max(whole, 1)
    return f"[{'#' * filled}{'-' * (_BAR - filled)}] {done / 1e6:.1f} of {whole / 1e6:.1f} MB"


def _find() -> _Display | None:
    """Where somebody would see it, if anywhere. IPython is asked only if it runs this process already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and type(shell).__name__ == "ZMQInteractiveShell":
        return _Notebook(importlib.import_module("IPython.display").display)
    if sys.stderr is not None and sys.stderr.isatty():
        return _Terminal()
    return None
