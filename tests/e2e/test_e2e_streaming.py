"""Tokens come while a generation runs: here, from a server, batched with others, and again after a requeue."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from interpose import CONFIG, LanguageModel
from interpose.errors import BadArgument, InvalidPayload
from interpose.graph.model import Graph, Invoke, Run
from interpose.live import Live, NewText
from interpose.tokens import Tokenizer
from interpose.wire.messages import Tokens, decode_server, encode
from interpose.wire.stream import Changed, NewTokens
from models import tiny
from serving import Served, parts, serve

PROMPTS = ["The capital of France is", "Once upon a"]


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny("gpt2")


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(f"tiny={folder}", data_dir=tmp_path_factory.mktemp("streaming")) as server:
        yield server


@pytest.fixture(params=[False, True], ids=["local", "remote"])
def model(request: Any, folder: Path, served: Served) -> Any:
    if request.param:
        return LanguageModel("tiny", host=served.host, api_key=served.key)
    return LanguageModel(str(folder))


def where(model: Any) -> dict[str, bool]:
    return {"remote": model._access.source == "tiny"}


def test_each_token_comes_in_order(model: Any) -> None:
    pieces: list[NewText] = []
    with model.generate(PROMPTS, max_new_tokens=8, stream=pieces.append, **where(model)) as t:
        ids = t.result.save()
    steps = len(pieces)
    assert [piece.step for piece in pieces] == list(range(steps))
    for row in range(2):
        new = [piece.ids[row] for piece in pieces if piece.ids[row] is not None]
        assert ids[row].tolist()[-steps:][: len(new)] == new
        before = model.tokenizer.encode(PROMPTS[row])
        whole = model.tokenizer.decode([*before, *new], skip_special_tokens=True)
        text = "".join(piece.texts[row] for piece in pieces)
        assert whole.removeprefix(PROMPTS[row]).startswith(text)
        assert text


def test_watching_needs_no_save_and_changes_nothing(model: Any) -> None:
    pieces: list[NewText] = []
    with model.generate(PROMPTS[0], max_new_tokens=6, stream=pieces.append, **where(model)):
        model.transformer.h[1].output[:] *= 2.0
    with model.generate(PROMPTS[0], max_new_tokens=6, **where(model)) as t:
        model.transformer.h[1].output[:] *= 2.0
        ids = t.result.save()
    assert [piece.ids[0] for piece in pieces] == ids[0, -len(pieces) :].tolist()


def test_an_error_of_the_function_is_the_users(model: Any) -> None:
    def fail(piece: NewText) -> None:
        raise ZeroDivisionError(piece.step)

    block = model.generate(PROMPTS[0], max_new_tokens=6, stream=fail, **where(model))
    with pytest.raises(ZeroDivisionError), block as t:
        t.result.save()
    with model.generate(PROMPTS[0], max_new_tokens=2, **where(model)) as t:
        ids = t.result.save()
    assert ids.shape[1] == len(model.tokenizer.encode(PROMPTS[0])) + 2


@pytest.fixture
def remote(served: Served) -> Any:
    return LanguageModel("tiny", host=served.host, api_key=served.key)


def test_tokens_are_events_of_the_job(remote: Any) -> None:
    with remote.generate(PROMPTS[0], max_new_tokens=5, stream=True, remote=True, blocking=False) as t:
        ids = t.result.save()

    async def follow() -> list[Any]:
        return [event async for event in t.job]

    events = asyncio.run(follow())
    tokens = [event for event in events if isinstance(event, NewTokens)]
    t.job.result(90)
    assert [event.ids[0] for event in tokens] == ids[0, -len(tokens) :].tolist()
    assert isinstance(events[-1], Changed)
    with pytest.raises(BadArgument, match="async for"):
        remote.generate(PROMPTS[0], stream=print, remote=True, blocking=False)


def test_a_slow_reader_holds_up_nobody(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads its first token once another's job beside it is over, which streams what it would alone."""
    monkeypatch.setattr(CONFIG, "PROGRESS", False)
    seen: dict[str, list[int | None]] = {"slow": [], "quick": []}
    quick_over = threading.Event()
    waited: list[bool] = []

    def generate(name: str) -> None:
        def take(piece: NewText) -> None:
            if name == "slow":
                waited.append(quick_over.wait(60))
            seen[name].append(piece.ids[0])

        with remote.generate(PROMPTS[0], max_new_tokens=12, eos_token_id=[-1], stream=take, remote=True):
            pass
        if name == "quick":
            quick_over.set()

    threads = [threading.Thread(target=generate, args=args) for args in (("slow",), ("quick",))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert seen["slow"] == seen["quick"]
    assert len(seen["slow"]) == 12
    assert all(waited)


def test_whole_characters_and_new_attempts(folder: Path) -> None:
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
    text = " naïver Äpfel 你好 🙂!"
    ids = tokenizer.encode(text)
    told: list[NewText] = []
    live = Live(told.append, Graph((Run("generate", (Invoke(((5, 9, 33),)),)),)), tokenizer)
    for step, token in enumerate(ids[:4]):
        live.take(NewTokens(1, 0, step, (token,)))
    again = len(told)
    for step, token in enumerate(ids):
        live.take(NewTokens(2, 0, step, (token,)))
    assert "".join(piece.text for piece in told[again:]) == text
    assert not any("\ufffd" in piece.text for piece in told)
    assert [piece.attempt for piece in told] == [1] * 4 + [2] * len(ids)
    assert any(piece.text == "" for piece in told)


@pytest.mark.slow
def test_after_a_requeue_the_stream_begins_again(folder: Path, tmp_path: Path) -> None:
    pieces: list[NewText] = []
    with serve(f"tiny={folder}", data_dir=tmp_path / "ward", env={"INTERPOSE_SERVER_LEASE_S": "8"}) as server:
        model = LanguageModel("tiny", host=server.host, api_key=server.key)

        def take(piece: NewText) -> None:
            pieces.append(piece)
            if (piece.attempt, piece.step) == (1, 2):
                for process in parts(server, "interpose_server.worker"):
                    process.kill()

        with model.generate(PROMPTS[0], max_new_tokens=12, eos_token_id=[-1], stream=take, remote=True) as t:
            with t.all():
                t.loop(30, lambda turn, value: (value @ value).softmax(-1), torch.ones(600, 600)).sum().save()
            ids = t.result.save()
    first = [piece for piece in pieces if piece.attempt == 1]
    again = [piece for piece in pieces if piece.attempt == 2]
    assert [piece.step for piece in first] == list(range(len(first)))
    assert 3 <= len(first) < 12
    assert [piece.step for piece in again] == list(range(12))
    assert [piece.ids[0] for piece in again] == ids[0, -12:].tolist()
    assert [piece.text for piece in again[: len(first)]] == [piece.text for piece in first]


def test_messages_are_read_strictly() -> None:
    sound = Tokens("0" * 32, 3, 1, 0, 5, (7, None, 9))
    assert decode_server(encode(sound)) == sound
    for wrong in [[-1], [1.5], ["7"], [True], 7, [2**31], [[1]]]:
        body = {"type": "tokens", **sound.to_plain(), "ids": wrong}
        with pytest.raises(InvalidPayload):
            decode_server(b"\0" + msgpack.packb(body))
