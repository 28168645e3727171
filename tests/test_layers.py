"""Imports run downhill, as the design's section 3 draws them: each part names the parts it may use."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {"interpose": ROOT / "client" / "interpose", "interpose_server": ROOT / "server" / "interpose_server"}

CLIENT = {
    "errors": set(),
    "graph": {"errors"},
    "wire": {"errors", "graph"},
    "draw": {"errors", "graph"},
    "torch": {"errors", "graph"},
    "tracing": {"errors", "graph", "draw", "torch"},
    "runtime": {"errors", "graph", "wire"},
    "transports": {"errors", "config", "graph", "wire", "runtime"},
}
"""Part -> the parts of the client it may import. The rest of the client may import all but the command line."""

TORCH = {
    *("tracing/torch_face.py", "tracing/torch_names.py", "wire/torch_tensors.py", "transports/local.py"),
    "tokens.py",
}
"""Files outside `runtime` that import torch, each only where torch is there."""

GRAPH_NEEDS = {"msgpack", "pydantic"} | set(sys.stdlib_module_names)

VERBS = {"alone.py", "server.py", "catalogue.py", "cluster.py"}
"""Files of the command line that need the server's package, imported when their verb is called."""

SERVER_MAY_NOT = {"tracing", "transports", "lab", "models", "client", "cli", "access"}

Import = tuple[str, bool]
"""Absolute name, and whether it is made only when a function is called."""


def files(package: str, part: str = "") -> list[Path]:
    home = HOMES[package] / part
    return [home.with_suffix(".py")] if home.with_suffix(".py").is_file() and part else sorted(home.rglob("*.py"))


def imports(path: Path) -> list[Import]:
    """What a file imports, but for type checkers alone."""
    package, home = next((name, home) for name, home in HOMES.items() if path.is_relative_to(home))
    parts = [package, *path.relative_to(home).with_suffix("").parts]
    return list(_walk(ast.parse(path.read_text("utf-8")), parts, False))


def _walk(node: ast.AST, parts: list[str], lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, lazy) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        base = parts[: len(parts) - node.level] if node.level else []
        whole = ".".join([*base, *([node.module] if node.module else [])])
        yield whole, lazy
        yield from ((f"{whole}.{alias.name}", lazy) for alias in node.names)
    lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, parts, lazy)


def parts_of(package: str) -> set[str]:
    return {path.stem for path in HOMES[package].iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__pycache__"
    }


def used(path: Path, package: str) -> set[str]:
    """Parts of a package that a file imports."""
    names = {name.split(".")[1] for name, _ in imports(path) if name.startswith(f"{package}.")}
    return names & parts_of(package)


@pytest.mark.parametrize("part", sorted(CLIENT))
def test_the_client_imports_downhill(part: str) -> None:
    found = files("interpose", part)
    assert found
    for path in found:
        up = used(path, "interpose") - CLIENT[part] - {part}
        assert not up, f"{path.relative_to(ROOT)} imports {', '.join(sorted(up))}"


def test_local_runs_load_the_runtime_late() -> None:
    for path in files("interpose", "transports"):
        early = [name for name, lazy in imports(path) if name.startswith("interpose.runtime") and not lazy]
        assert not early, f"{path.name} imports {early}"


def test_torch_is_imported_where_it_is_needed_and_nowhere_else() -> None:
    for path in files("interpose"):
        name = path.relative_to(HOMES["interpose"]).as_posix()
        found = any(name.split(".")[0] == "torch" for name, _ in imports(path))
        if found and not name.startswith("runtime/"):
            assert name in TORCH, f"{name} imports torch"
    for path in files("interpose_server"):
        found = any(name.split(".")[0] == "torch" for name, _ in imports(path))
        assert not found or {"worker", "models", "shards"} & set(path.parts), f"{path} imports torch"


def test_the_graph_needs_the_standard_library_and_little_else() -> None:
    for path in files("interpose", "graph"):
        outside = {name.split(".")[0] for name, _ in imports(path)} - GRAPH_NEEDS - {"interpose"}
        assert not outside, f"{path.name} imports {outside}"


def test_client_and_server_keep_apart() -> None:
    for path in files("interpose"):
        server = [name for name, _ in imports(path) if name.split(".")[0] == "interpose_server"]
        assert not server or (path.parts[-2] == "cli" and path.name in VERBS), path
        verbs = [
            lazy
            for name, lazy in imports(path)
            if name.startswith(tuple(f"interpose.cli.{verb[:-3]}" for verb in VERBS))
        ]
        assert all(verbs) or path.name in VERBS, f"{path} imports the server's verbs before they are asked for"
    for path in files("interpose_server"):
        up = used(path, "interpose") & SERVER_MAY_NOT
        assert not up, f"{path.relative_to(ROOT)} imports {', '.join(sorted(up))}"


def test_redis_is_the_brokers_and_ray_the_shards() -> None:
    for path in files("interpose_server"):
        names = {name for name, _ in imports(path)}
        inside = set(path.relative_to(HOMES["interpose_server"]).parts)
        assert not any(name.split(".")[0] == "ray" for name in names) or "shards" in inside, path
        # What isn't public is in `shards/ray_internals.py`, looked up when it is used.
        assert not any(name.startswith(("ray._", "ray.core.", "ray.experimental.")) for name in names), path
        # Its errors concern everybody who asks the broker; `valkey` starts a server and asks whether it is up.
        commands = {name for name in names if name.split(".")[0] == "redis" and "redis.exceptions" not in name}
        assert not commands or "broker" in inside or path.name == "valkey.py", path


@pytest.mark.parametrize(
    "path",
    ["worker/scheduler.py", "models/lifecycle.py", "models/rules.py", "models/packing.py", "models/schedule.py"],
)
def test_decisions_are_pure(path: str) -> None:
    for name, _ in imports(HOMES["interpose_server"] / path):
        assert name.split(".")[0] not in {"torch", "ray", "redis", "asyncio", "time", "os", "random"}, name


def test_nothing_unpickles_or_runs_code() -> None:
    for package in HOMES:
        for path in files(package):
            names = {name.split(".")[0] for name, _ in imports(path)}
            assert not names & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}, path
            calls = [
                node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
            ]
            assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"exec", "eval", "compile"}, path
