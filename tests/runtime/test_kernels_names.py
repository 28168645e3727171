"""torch's functions and torch's names: each leads to its operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch as real
import torch.nn.functional as functional
from interpose import errors, torch
from interpose.graph import ops
from interpose.graph.values import DType
from interpose.tracing.torch_names import function_table


class Logged(real.Tensor):
    """Notes the functions torch hands over."""

    seen: list[tuple[Any, tuple[Any, ...], Mapping[str, Any]]] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append((func, args, kwargs or {}))
        return real.zeros(2, 2)


X = real.ones(2, 2).as_subclass(Logged)
LINE = real.ones(2).as_subclass(Logged)

OPERATORS = {
    "add": (lambda: X + 1, lambda: 1 + X),
    "sub": (lambda: X - 1, lambda: 1 - X, lambda: real.rsub(X, 1)),
    "mul": (lambda: X * 2, lambda: 2 * X),
    "div": (lambda: X / 2, lambda: 2 / X, lambda: real.true_divide(X, 2)),
    "floor_divide": (lambda: X // 2, lambda: 2 // X),
    "remainder": (lambda: X % 2, lambda: 2 % X),
    "pow": (lambda: X**2, lambda: 2**X),
    "matmul": (lambda: X @ X, lambda: X.__rmatmul__(real.ones(2, 2))),
    "bitwise_and": (lambda: X & X, lambda: 1 & X),
    "bitwise_or": (lambda: X | X, lambda: 1 | X),
    "bitwise_xor": (lambda: X ^ X, lambda: 1 ^ X),
    "bitwise_left_shift": (lambda: X << 1, lambda: 1 << X),
    "bitwise_right_shift": (lambda: X >> 1, lambda: 1 >> X),
    "neg": (lambda: -X,),
    "positive": (lambda: +X,),
    "abs": (lambda: abs(X),),
    "bitwise_not": (lambda: ~X,),
    "lt": (lambda: X < 1,),
    "gt": (lambda: X > 1, lambda: X > 1),
    "eq": (lambda: X == 1,),
    "ne": (lambda: X != 1,),
    "getitem": (lambda: X[0],),
    "T": (lambda: X.T,),
    "mT": (lambda: X.mT,),
    "where": (lambda: X.where(X > 0, X), lambda: real.where(real.ones(2, 2) > 0, X, X)),
    "softmax": (lambda: X.softmax(-1), lambda: real.softmax(X, -1), lambda: functional.softmax(X, -1)),
    "gelu": (lambda: functional.gelu(X, approximate="tanh"), lambda: real._C._nn.gelu(X)),
    "silu": (lambda: functional.silu(X),),
    "relu": (lambda: functional.relu(X), lambda: X.relu(), lambda: real.relu(X)),
    "layer_norm": (lambda: functional.layer_norm(X, (2,)), lambda: real.layer_norm(X, (2,))),
    "cross_entropy": (lambda: functional.cross_entropy(X, X),),
    "mse_loss": (lambda: functional.mse_loss(X, X),),
    "norm": (lambda: X.norm(), lambda: real.norm(X), lambda: X.norm(dim=-1)),
    "linalg_norm": (lambda: real.linalg.norm(X),),
    "einsum": (lambda: real.einsum("ij->ji", X),),
    "split": (lambda: X.split(1), lambda: real.split(X, 1)),
    "stack": (lambda: real.stack([X, X]),),
    "embedding": (lambda: functional.embedding(real.zeros(2, dtype=real.int64), X),),
    "normalize": (lambda: functional.normalize(X, dim=-1),),
    "max_pool1d": (lambda: functional.max_pool1d(X, 1),),
    "sigmoid": (lambda: functional.sigmoid(X), lambda: real.special.expit(X)),
    "full_like": (lambda: real.full_like(X, 1),),
    "float": (lambda: X.float(),),
    "kl_div": (lambda: functional.kl_div(X, X),),
    "cosine_similarity": (lambda: functional.cosine_similarity(X, X, dim=-1),),
    "pad": (lambda: functional.pad(X, (1, 1)),),
    "meshgrid": (lambda: real.meshgrid(LINE, LINE, indexing="ij"),),
}


@pytest.mark.parametrize("name", list(OPERATORS))
def test_what_torch_hands_over_is_known_and_binds(name: str) -> None:
    table = function_table()
    for action in OPERATORS[name]:
        Logged.seen.clear()
        action()
        func, args, kwargs = Logged.seen[-1]
        op, swapped = table[func]
        assert op == name
        args = (args[1], args[0], *args[2:]) if swapped else args
        ops.bind(ops.lookup(op), args, kwargs, lambda value: isinstance(value, real.Tensor))


def test_every_spelling_torch_has_is_in_the_table() -> None:
    table = function_table()
    homes = {
        "torch": real,
        "torch.Tensor": real.Tensor,
        "torch.nn.functional": functional,
        "torch.linalg": real.linalg,
    }
    for spelling, op in ops.SPELLINGS.items():
        home, _, name = spelling.rpartition(".")
        found = getattr(homes.get(home, real.special), name, None)
        if callable(found):
            assert table[found][0] == op, spelling


class Deferred:
    """Stands where a deferred value would, and answers with what it was told to record."""

    def _interpose_record(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return name, args, dict(kwargs)


def test_the_namespace_hands_over_to_the_first_deferred_value() -> None:
    h = Deferred()
    assert torch.softmax(h, dim=-1) == ("softmax", (h,), {"dim": -1})
    assert torch.nn.functional.gelu(h)[0] == "gelu"
    assert torch.linalg.norm(h)[0] == "linalg_norm"
    assert torch.cat([1, (h,)])[0] == "cat"
    assert torch.where(True, 1.0, other=h)[0] == "where"
    assert torch.float32 == DType("float32") == torch.float
    assert "softmax" in dir(torch) and "gelu" in dir(torch.nn.functional)


def test_the_namespace_refuses_the_rest() -> None:
    with pytest.raises(errors.DeferredError, match="deferred"):
        torch.softmax(1.0, dim=0)
    with pytest.raises(errors.UnknownOp, match="softmax"):
        _ = torch.sofmax
    with pytest.raises(errors.UnknownOp, match="zeros"):
        _ = torch.empty
    assert not hasattr(torch, "load") and not hasattr(torch.nn, "Module")
