"""Mutated submissions straight over HTTP: each is taken or refused with a code, and none breaks the server."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import httpx
import msgpack
import pytest
from interpose.errors import BY_CODE, InvalidPayload
from interpose.transports.socket import Socket
from serving import Served
from workloads import EVERY, MORE

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 2**31, 2**63 - 1, -(2**63), 0.5, float("nan"), float("inf"), "", "x", "h.0", "\ud7ff",
    "__class__", "../../etc/passwd", "a" * 5000, b"", b"\x80\x04N.", [], {}, [[]], {"ref": 0}, {"ref": 10**6},
    {"slice": [None, None, 0]}, [2**40] * 3, [-1], {"dtype": "float99"}, list(range(300)),
)  # fmt: skip


@pytest.fixture(scope="module")
def http(lab: Served) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {lab.key}", "Content-Type": "application/msgpack"}
    with httpx.Client(base_url=lab.host, headers=headers, trust_env=False, timeout=60) as client:
        yield client


def recorded(model: Any, program: str) -> bytes:
    """The body a client sends for a program."""
    bodies = []

    async def capture(_: Socket, job: str, body: bytes) -> bool:
        bodies.append(body)
        raise InvalidPayload("captured")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Socket, "submit", capture)
        with pytest.raises(InvalidPayload, match="captured"):
            EVERY[program](model, remote=True)
    return bodies[0]


def flipped(body: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, left out, doubled; or the end cut off."""
    data = bytearray(body)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(data))
        match chance.randrange(5):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                del data[at : at + chance.randrange(1, 9)]
            case 3:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4 if at > 8:
                del data[at:]
    return bytes(data)


def bent(body: bytes, chance: random.Random) -> bytes:
    """One or two parts of the decoded body replaced, dropped, repeated or swapped, under a fresh id."""
    plain = msgpack.unpackb(body)
    plain["id"] = uuid.UUID(int=chance.getrandbits(128)).hex
    for _ in range(chance.choice([1, 1, 2])):
        holders = list(containers(plain))
        holder = chance.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = chance.choice(keys)
        match chance.randrange(6):
            case 0 | 1 | 2:
                holder[key] = deepcopy(chance.choice(HOSTILE))
            case 3:
                del holder[key]
            case 4 if isinstance(holder, list):
                holder.append(deepcopy(holder[key]))
            case 5:
                other = chance.choice(holders)
                if other:
                    values = list(other.values()) if isinstance(other, dict) else other
                    holder[key] = deepcopy(chance.choice(values))
    try:
        return msgpack.packb(plain, unicode_errors="surrogatepass")  # type: ignore[no-any-return]
    except (ValueError, RecursionError, TypeError):
        return body


def containers(plain: Any) -> Iterator[Any]:
    if isinstance(plain, (dict, list)) and plain:
        yield plain
        for item in plain.values() if isinstance(plain, dict) else plain:
            yield from containers(item)


def send(http: httpx.Client, body: bytes) -> str | None:
    """Returns the job's id if it was taken; anything but that and a coded refusal is an error."""
    answer = http.post("/v1/jobs", content=body)
    if answer.status_code == 202:
        return str(answer.json()["id"])
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["code"] in BY_CODE and problem["status"] == answer.status_code
    assert "Traceback" not in answer.text and "site-packages" not in answer.text
    return None


def ended(http: httpx.Client, job: str) -> dict[str, Any]:
    for _ in range(2400):
        info: dict[str, Any] = http.get(f"/v1/jobs/{job}").json()
        if info["status"] in ("completed", "failed", "cancelled"):
            return info
        time.sleep(0.05)
    raise AssertionError(f"{job} is still {info['status']}")


@pytest.mark.parametrize("program", ["look", "patch", "steer", "lens", "attention", *MORE])
@pytest.mark.parametrize("mutate", [flipped, bent])
def test_mutations(
    http: httpx.Client, open_model: Callable[..., Any], program: str, mutate: Callable[..., bytes]
) -> None:
    body = recorded(open_model(), program)
    chance = random.Random(f"{program} {mutate.__name__}")
    taken = [job for _ in range(200) if (job := send(http, mutate(body, chance)))]
    if mutate is bent:
        assert len(taken) > 5
    for job in dict.fromkeys(taken):
        info = ended(http, job)
        assert info.get("error", {}).get("code") != "internal_error", info


def test_truncated(http: httpx.Client, open_model: Callable[..., Any]) -> None:
    body = recorded(open_model(), "steer")
    for end in range(0, len(body) - 1, max(len(body) // 150, 1)):
        assert send(http, body[:end]) is None


def test_random_bytes(http: httpx.Client) -> None:
    chance = random.Random(0)
    for _ in range(100):
        assert send(http, chance.randbytes(chance.randrange(2000))) is None
