"""Names and numbers both sides agree on."""

from __future__ import annotations

PROTOCOL = 1
"""Version of everything in this package. Each side states its own in `HEADER`; an unequal pair stops there."""

HEADER = "Interpose-Protocol"
DTYPE_HEADER = "Interpose-Dtype"
SHAPE_HEADER = "Interpose-Shape"
"""On a PUT of raw tensor bytes: the dtype's name, and sizes separated by commas ("" for no dimension)."""

TAKES_HEADER = "Interpose-Takes"
"""On a stream's request: kinds of messages the client takes beside those every client knows, between commas."""

MSGPACK = "application/msgpack"
JSON = "application/json"
PROBLEM = "application/problem+json"

INLINE_BYTES = 1 << 20
"""Attachments above this are uploaded before the job that names them."""

CHUNK_BYTES = 1 << 20
"""Bytes of a save in one websocket message, unless a server's hello says otherwise."""

SUBMIT_BYTES = 32 << 10
"""Submissions up to here may be handed in over the websocket; POST takes those and larger ones."""

MAX_CHUNK_BYTES = 16 << 20
"""What a client accepts in one websocket message."""
