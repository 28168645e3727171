"""Which blob store the settings ask for."""

from __future__ import annotations

from interpose.errors import ConfigError

from ..broker.store import Store
from ..settings import Settings
from .local import LocalBlobs
from .protocol import Blobs


def open_blobs(settings: Settings) -> Blobs:
    """The store of `settings.blobs`. Connects to nothing yet. Raises ConfigError, also for a missing extra."""
    if settings.blobs == "file":
        return LocalBlobs(settings.blob_dir, settings.blob_bytes)
    try:
        from .s3 import S3Blobs
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'blobs in a bucket need {error.name}; install it with: pip install "interpose[s3]"'
        ) from error
    return S3Blobs(settings.blobs, Store.at(settings), settings.blob_bytes)
