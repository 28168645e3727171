"""The blob store: a folder, or a bucket of an S3-compatible service."""

from .local import LocalBlobs, LocalReader
from .opening import open_blobs
from .patient import put_patiently
from .protocol import BLOCK, BlobKey, Blobs, Reader, Writer, read, whole

__all__ = [
    "BLOCK",
    "BlobKey",
    "Blobs",
    "LocalBlobs",
    "LocalReader",
    "Reader",
    "Writer",
    "open_blobs",
    "put_patiently",
    "read",
    "whole",
]
