"""Child processes of the embedded server: started, watched, restarted, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

CHILD = Path(__file__).with_name("child.py")
STEADY_S = 30.0
"""A child that ran for so long has recovered: its next restart is quick again."""
SLOWEST_S = 30.0


class Child:
    """A command kept running.

    Args:
        label: what it is called in messages.
        give_up: exit statuses after which it isn't started again.
        ended: told of the status with which it ended by itself.
        again: told before it is started again.
        say: takes one line for the operator.
    """

    def __init__(
        self,
        label: str,
        command: Sequence[str],
        say: Callable[[str], None],
        *,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        give_up: Sequence[int] = (),
        ended: Callable[[int], Awaitable[None]] | None = None,
        again: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.label = label
        self.gave_up = asyncio.Event()
        self._command = command
        self._say = say
        self._env = env
        self._pass_fds = pass_fds
        self._give_up = give_up
        self._ended = ended
        self._again = again
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        await self._spawn()
        self._watch = asyncio.create_task(self._keep())

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def kill(self) -> None:
        """End it at once; it is started again as after any other end."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL if that isn't enough in time. Returns once it is gone."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            self._say(f"{self.label} doesn't stop; killing it")
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _spawn(self) -> None:
        # A session of its own: Ctrl-C in the terminal reaches the parent alone, which stops children in order.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(CHILD), str(os.getpid()), *self._command),
            env=self._env,
            pass_fds=self._pass_fds,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
        )

    async def _keep(self) -> None:
        wait_s = 0.2
        while True:
            assert self._process is not None
            started = time.monotonic()
            status = await self._process.wait()
            if status in self._give_up:
                self.gave_up.set()
                return
            if time.monotonic() - started > STEADY_S:
                wait_s = 0.2
            if self._ended is not None:
                await self._ended(status)
            self._say(f"{self.label} ended with status {status}; starting it again in {wait_s:g} s")
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, SLOWEST_S)
            if self._again is not None:
                await self._again()
            await self._spawn()
