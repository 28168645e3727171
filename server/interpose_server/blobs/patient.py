"""Storing results in a store that may be away for a while."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from interpose.errors import InternalError, InterposeError, StorageUnavailable

from .protocol import Blobs

log = logging.getLogger(__name__)

RETRY_S = 0.5


async def put_patiently(
    blobs: Blobs, put: Callable[[], object], until: float, given_up: Callable[[], bool] = lambda: False
) -> bool:
    """Have `put` store something, in a thread; as long as the store is away, again and again.

    Args:
        until: monotonic time after which it isn't tried again.
        given_up: whether nobody wants it any more.

    Returns:
        False if it was given up.

    Raises:
        InterposeError: it can't be stored.
    """
    while not given_up():
        try:
            await blobs.run(put)
        except StorageUnavailable:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(RETRY_S)
        except InterposeError:
            raise
        except OSError as error:
            log.error("a result can't be stored: %s", error)
            raise InternalError("the server couldn't store a result") from error
        except Exception as error:
            # A fault of ours, or no memory for a copy: the job's end is still told, and other jobs go on.
            log.exception("a result can't be brought out")
            raise InternalError("the server failed while taking a result from the model") from error
        else:
            return True
    return False
