"""Why a model couldn't be loaded: a reason of a few, a sentence for its users, and when to try again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
from interpose.errors import ConfigError, InterposeError, ModelFailed, OutOfMemory

TOO_LARGE = "too_large"

SENTENCES: Mapping[str, str] = {
    "gated": "the hub gives it only to those it has let in, and this server isn't among them; ask the lab",
    "missing": "its files, or this revision of them, aren't where the lab's catalogue says; ask the lab",
    TOO_LARGE: "it is too large for the lab's devices",
    "unsupported": "its files can't be used by this server: they may need another version, or code of their own",
    "misconfigured": "what the lab's catalogue asks for it can't be; ask the lab",
    "network": "the place its files come from doesn't answer",
    "memory": "there isn't memory enough for it on the device it was given",
    "timeout": "loading it took longer than the lab allows",
    "crashed": "loading it ended in an error; the server's log says which",
}
"""By reason. Nothing of the server's paths: users read them."""

PASSING = frozenset({"network", "crashed", "memory", "timeout"})
"""Reasons that may be gone at the next try, which comes by itself; for the others somebody has to do something."""

TRIES = 3
"""So often loading may fail for a passing reason before those who wait are told."""

LONGEST_S = 3600.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Attributes:
    reason: a key of `SENTENCES`.
    detail: what the operator is told; may name paths.
    tries: how often it has failed in a row.
    at_ms, retry_ms: when it failed, and from when on it is tried again if somebody wants it.
    """

    reason: str
    detail: str
    tries: int
    at_ms: int
    retry_ms: int

    @property
    def final(self) -> bool:
        """Whether those who wait for the model are told to give up."""
        return self.reason not in PASSING or self.tries >= TRIES

    def error(self, model: str, now_ms: int) -> ModelFailed:
        """What its users are told."""
        details: dict[str, Any] = {"state": "failed", "reason": self.reason}
        if self.retry_ms > now_ms:
            details["retry_after_s"] = -(-(self.retry_ms - now_ms) // 1000)
        return ModelFailed(f"{model} can't be loaded: {SENTENCES[self.reason]}", details=details)

    def to_plain(self) -> dict[str, Any]:
        """For its users."""
        return {"reason": self.reason, "message": SENTENCES[self.reason], "retry_ms": self.retry_ms}

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb(asdict(self))
        return packed

    @classmethod
    def unpack(cls, raw: Any) -> Failure | None:
        return cls(**msgpack.unpackb(raw)) if raw else None

    @classmethod
    def after(cls, before: Failure | None, why: BaseException, now_ms: int, retry_s: float) -> Failure:
        """The next in a row of failures.

        Args:
            why: what loading raised.
            retry_s: how long to leave it alone: at first, if it may pass, a tenth of that, each time doubled.
        """
        reason = reason_of(why)
        tries = before.tries + 1 if before is not None and before.reason == reason else 1
        wait_s = retry_s if reason not in PASSING else min(retry_s / 10 * 2 ** (tries - 1), LONGEST_S)
        detail = why.message if isinstance(why, InterposeError) else f"{type(why).__name__}: {why}"
        return cls(reason, detail[:2000], tries, now_ms, now_ms + int(wait_s * 1000))


def reason_of(why: BaseException) -> str:
    """A key of `SENTENCES`: what the error itself says, else by its kind."""
    if isinstance(why, InterposeError) and why.details.get("reason") in SENTENCES:
        return str(why.details["reason"])
    if isinstance(why, OutOfMemory | MemoryError):
        return "memory"
    if isinstance(why, ConfigError):
        return "unsupported"
    if isinstance(why, TimeoutError):
        return "timeout"
    return "crashed"
