import asyncio
import subprocess
import sys
import threading

import pytest
from interpose.transports.loop import Background, background


def test_one_loop_a_process():
    assert background() is background()
    assert background().run(asyncio.sleep(0, 5)) == 5
    with pytest.raises(TimeoutError):
        background().run(asyncio.sleep(9), 0.05)


def test_it_would_not_wait_for_itself():
    async def inside():
        background().run(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="await it"):
        background().run(inside())


def test_closing_ends_tasks_and_thread():
    own, ended = Background(), threading.Event()

    async def forever():
        try:
            await asyncio.sleep(99)
        finally:
            ended.set()

    own.start(forever())
    own.run(asyncio.sleep(0.01))
    own.close()
    assert ended.is_set()
    assert not own.thread.is_alive()


def test_the_interpreter_ends_without_a_word(lab):
    """With a websocket open, a job in progress, and warnings on."""
    lab.hold.set()
    code = f"""
from scripted_lab import GRAPH
from interpose.client import submit_remote
job = submit_remote(GRAPH, "m", {{}}, host={lab.url!r}, api_key="secret")
"""
    here = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=here,
        timeout=30,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
