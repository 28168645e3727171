import asyncio
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
from interpose.transports.loop import Background, background
from scripted_lab import part_of


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


@pytest.mark.parametrize("fetching", [False, True])
def test_the_interpreter_ends_without_a_word(lab, fetching):
    """With a websocket open, a job in progress or its large save half here, and warnings on."""
    if fetching:
        lab.apart, lab.values = True, {1: np.zeros(4 << 20, np.uint8)}
        lab.faults = [partial(part_of, drop=1 << 20, stall=True)]
    else:
        lab.hold.set()
    code = f"""
import logging, threading
# On a busy machine a step of a task may well take a tenth of a second.
logging.getLogger("asyncio").addFilter(lambda record: not record.getMessage().startswith("Executing "))
from scripted_lab import GRAPH
from interpose.client import submit_remote
job = submit_remote(GRAPH, "m", {{}}, host={lab.url!r}, api_key="secret")
while {fetching} and not any(thread.name == "interpose-fetch" for thread in threading.enumerate()):
    pass
"""
    here = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=here,
        timeout=120,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
