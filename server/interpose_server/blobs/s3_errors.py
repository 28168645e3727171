"""What goes wrong with a bucket, as errors of ours, without what the service says of keys and signatures."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from interpose.errors import StorageUnavailable
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

log = logging.getLogger(__name__)

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")


@contextmanager
def mapped(*, missing: bool = False) -> Iterator[None]:
    """Raises StorageUnavailable for what the bucket's service does wrong.

    Args:
        missing: whether an object may be missing; that is FileNotFoundError then.
    """
    try:
        yield
    except (BaseError, OSError) as error:
        if missing and isinstance(error, FileNotFoundError):
            raise
        log.warning("the bucket failed: %s", reason(error))
        raise StorageUnavailable(
            "the server's store of uploads and results can't be reached; try again", details={"retry_after_s": 2}
        ) from error


def reason(error: Exception) -> str:
    """For the log: the service's own code and status. Its whole answer may quote keys and signatures."""
    text = str(error)
    found = [found[1] for pattern in (_STATUS, _CODE) if (found := pattern.search(text))]
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        found.insert(0, "access was denied")
    return " ".join(found) or f"no answer ({type(error).__name__})"
