"""Every way of being wrong: a coded error of its own class, at the user's line where there is one."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from clients import HERE
from interpose import LanguageModel
from interpose.errors import (
    InterposeError,
    LimitExceeded,
    Unauthorized,
    UnknownModel,
    UnknownModule,
    UnknownOp,
    WrongOrder,
)
from serving import INTERPOSE, Served

PROMPT = "The capital of France is"


def line_of(function: Callable[..., Any], mark: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(index for index, line in enumerate(lines) if f"# {mark}" in line)


def trace(model: LanguageModel) -> Any:
    with model.trace(PROMPT, remote=True):
        return model.output.save()


@pytest.mark.parametrize("key", ["ip_" + "x" * 43, "not a key at all".replace(" ", "-"), None])
def test_wrong_and_missing_keys(lab: Served, key: str | None) -> None:
    for _ in range(2):
        with pytest.raises(Unauthorized, match="key"):
            trace(LanguageModel("tiny-gpt2", host=lab.host, api_key=key))


def test_a_known_model_needs_the_key_all_the_same(lab: Served, open_model: Callable[..., Any]) -> None:
    model = open_model()
    trace(model)
    with pytest.raises(Unauthorized):
        trace(LanguageModel("tiny-gpt2", host=lab.host, api_key="ip_" + "y" * 43))


def test_a_revoked_key(lab: Served) -> None:
    def keys(*args: str) -> str:
        command = [INTERPOSE, "keys", *args, "--data-dir", lab.data_dir]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    token = keys("create", "--user", "eve").strip()
    model = LanguageModel("tiny-gpt2", host=lab.host, api_key=token)
    trace(model)
    key = next(line.split()[0] for line in keys("list").splitlines() if " eve " in line)
    keys("revoke", key)
    with pytest.raises(Unauthorized, match="revoked"):
        trace(model)


def test_an_unknown_model_says_what_is_served(lab: Served) -> None:
    with pytest.raises(UnknownModel, match=r"tiny-gpt2.*tiny-llama"):
        trace(LanguageModel("gpt-17", host=lab.host, api_key=lab.key))


def test_an_unknown_module_names_the_nearest(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with pytest.raises(UnknownModule, match="mlp"), model.trace(PROMPT, remote=True):
        model.transformer.h[1].mpl.output.save()


def test_an_unknown_operation(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with pytest.raises(UnknownOp, match="frobnicate"), model.trace(PROMPT, remote=True):
        model.output.frobnicate().save()


def test_wrong_order_names_the_line(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with pytest.raises(WrongOrder) as caught, model.trace(PROMPT, remote=True):
        later = model.transformer.h[2].output[0]
        model.transformer.h[0].output[0][:] = later  # too early
    assert caught.value.source is not None
    assert caught.value.source.file == __file__
    assert caught.value.source.line == line_of(test_wrong_order_names_the_line, "too early")


def test_ten_times_the_nodes(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with pytest.raises(LimitExceeded) as caught, model.trace(PROMPT, remote=True):
        value = model.output
        for _ in range(20_000):
            value = value + 1
        value.save()
    assert caught.value.details == {"limit": "nodes", "asked": 20_002, "allowed": 2_000}


def test_ten_times_the_tokens(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with pytest.raises(LimitExceeded) as caught, model.trace([[5] * 80] * 1024, remote=True):
        model.output[:, -1].save()
    assert caught.value.details == {"limit": "tokens", "asked": 81_920, "allowed": 8_192}


def test_ten_times_the_result(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with pytest.raises(LimitExceeded) as caught, model.trace(PROMPT, remote=True):
        model.output.mean().expand(1000, 1000, 250).save()
    assert caught.value.details == {"limit": "result_bytes", "asked": 10**9, "allowed": 100 << 20}


def test_ten_times_the_payload(lab: Served) -> None:
    headers = {"Authorization": f"Bearer {lab.key}", "Content-Type": "application/msgpack"}
    answer = httpx.post(
        f"{lab.host}/v1/jobs", content=b"\xc4" * (40 << 20), headers=headers, trust_env=False, timeout=60
    )
    assert (answer.status_code, answer.json()["code"]) == (413, "limit_exceeded")


def test_a_prompt_beyond_the_positions(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with pytest.raises(InterposeError) as caught, model.trace([[5] * 1280], remote=True):
        model.output.save()
    assert caught.value.code == "limit_exceeded"


def test_a_token_outside_the_vocabulary(open_model: Callable[..., Any]) -> None:
    model = open_model()
    with pytest.raises(InterposeError) as caught, model.trace([[5, 400]], remote=True):
        model.output.save()
    assert caught.value.code == "index_out_of_range"


def test_no_server_at_all(lab: Served) -> None:
    script = (
        "from interpose import LanguageModel, CONFIG\n"
        "CONFIG.CONNECT_TIMEOUT = 0.5\n"
        "try: LanguageModel('tiny-gpt2', host='127.0.0.1:9', api_key='ip_x').trace('a', remote=True)\n"
        "except Exception as error: print(error.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=HERE)
    assert done.stdout == "connection_failed\n"
