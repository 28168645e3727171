"""One tree of errors: each with a code of its own, the same class beyond the wire and in another process."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections import Counter

import interpose.errors as errors
import msgpack
import pytest
from interpose.errors import BY_CODE, InterposeError, Source, from_wire


def classes(root: type[InterposeError] = InterposeError) -> list[type[InterposeError]]:
    return [root] + [found for sub in root.__subclasses__() for found in classes(sub)]


ALL = [cls for cls in classes() if cls.__module__ == "interpose.errors"]


def made(cls: type[InterposeError]) -> InterposeError:
    return cls(
        "what went wrong", node=3, op="add", source=Source("note.py", 7), details={"limit": "nodes", "asked": 9}
    )


def test_codes_are_unique_and_each_class_has_its_own() -> None:
    assert max(Counter(cls.code for cls in ALL).values()) == 1
    assert {cls.code: cls for cls in ALL} == dict(BY_CODE)
    assert all("code" in vars(cls) for cls in ALL)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", cls.code) for cls in ALL)
    assert all(400 <= cls.status < 600 for cls in ALL)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"^[│ ]*[├└]── (\w+)", errors.__doc__ or "", re.M)
    assert sorted(drawn) == sorted(cls.__name__ for cls in ALL[1:])


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_an_error_crosses_the_wire_as_itself(cls: type[InterposeError]) -> None:
    sent = made(cls).to_wire()
    for wire in (json.loads(json.dumps(sent)), msgpack.unpackb(msgpack.packb(sent))):
        found = from_wire(wire, Source("note.py", 7))
        assert type(found) is cls
        assert vars(found) == vars(made(cls))
        assert str(found) == str(made(cls))
    assert "source" not in sent, "lines and files stay with the client"


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_an_error_crosses_processes_as_itself(cls: type[InterposeError]) -> None:
    for found in (pickle.loads(pickle.dumps(made(cls))), copy.copy(made(cls)), copy.deepcopy(made(cls))):  # noqa: S301
        assert type(found) is cls
        assert vars(found) == vars(made(cls))
        assert found.args == made(cls).args


def test_a_code_of_a_newer_server_is_named() -> None:
    found = from_wire({"code": "weather", "message": "it rains"})
    assert type(found) is InterposeError
    assert str(found) == "it rains [weather]"


@pytest.mark.parametrize(
    "wire", [{}, {"code": 5}, {"message": None}, {"code": "bad_argument", "node": "x", "details": []}]
)
def test_a_malformed_description_is_an_error_all_the_same(wire: dict[str, object]) -> None:
    assert isinstance(from_wire(wire), InterposeError)


def test_the_first_node_named_stays_named() -> None:
    error = errors.BadArgument("no").at(2, "mul", None).at(5, "add", Source("note.py", 1))
    assert (error.node, error.op, error.source) == (2, "mul", Source("note.py", 1))
    assert "node 2 (mul)" in str(error)


def test_errors_are_what_python_expects_of_their_kind() -> None:
    assert issubclass(errors.UnknownModule, AttributeError)
    assert issubclass(errors.BadArgument, TypeError)
    assert issubclass(errors.IndexOutOfRange, IndexError)
    assert issubclass(errors.ShapeMismatch, ValueError)
    assert issubclass(errors.ConnectionFailed, ConnectionError)
