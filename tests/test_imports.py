"""What importing costs, and which way imports run."""

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLIENT, SERVER = ROOT / "client" / "interpose", ROOT / "server" / "interpose_server"

HEAVY = {"torch", "transformers", "httpx", "websockets", "tokenizers", "jinja2", "IPython"}
UPHILL = {
    "graph": {"wire", "tracing", "runtime", "transports", "lab", "models", "client", "cli"},
    "wire": {"tracing", "runtime", "transports", "lab", "models", "client", "cli"},
    "tracing": {"runtime", "transports", "lab", "models", "client", "cli"},
    "runtime": {"tracing", "transports", "lab", "models", "client", "cli"},
    "transports": {"tracing", "lab", "models", "client", "cli"},
}
"""Package -> parts of the client it must not import."""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_is_quick_and_light():
    loaded = json.loads(python("import sys, json, interpose; print(json.dumps(sorted(sys.modules)))"))
    assert not HEAVY & set(loaded)
    costs = []
    for _ in range(5):
        # Processor time: what importing takes, however busy the machine is beside it.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python("import interpose")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(costs) < 0.5


def test_importing_starts_nothing():
    assert python("import interpose, threading; print(threading.active_count())") == "1\n"


def test_the_client_runs_without_torch():
    code = "import sys; sys.modules['torch'] = None; import interpose.client, interpose.tokens, interpose.models"
    assert python(code + "; import interpose.transports.remote") == ""


def imported(path: Path, package: str) -> set[str]:
    """Absolute names of all modules a file imports, wherever in it, but for type checkers alone."""
    parts = [package, *path.relative_to(CLIENT if package == "interpose" else SERVER).with_suffix("").parts]
    found: set[str] = set()
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            whole = ".".join(filter(None, (base, node.module)))
            found |= {whole} | {f"{whole}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", sorted(UPHILL))
def test_imports_run_downhill(package):
    for path in (CLIENT / package).rglob("*.py"):
        up = {
            name
            for name in imported(path, "interpose")
            for above in UPHILL[package]
            if f"{name}.".startswith(f"interpose.{above}.")
        }
        if path.name == "local.py":
            up = {name for name in up if not name.startswith("interpose.runtime")}
        assert not up, f"{path.relative_to(ROOT)} imports {', '.join(sorted(up))}"


def test_client_and_server_keep_apart():
    for path in CLIENT.rglob("*.py"):
        if path.relative_to(CLIENT).parts[0] != "cli":
            up = {name for name in imported(path, "interpose") if name.startswith("interpose_server")}
            assert not up, f"{path.relative_to(ROOT)} imports {', '.join(sorted(up))}"
    for path in SERVER.rglob("*.py"):
        names = imported(path, "interpose_server")
        up = {
            name
            for name in names
            for part in ("tracing", "transports", "lab")
            if f"{name}.".startswith(f"interpose.{part}.")
        }
        assert not up, f"{path.relative_to(ROOT)} imports {', '.join(sorted(up))}"


def test_the_protocol_does_no_io():
    for path in (CLIENT / "wire").rglob("*.py"):
        assert not imported(path, "interpose") & {"asyncio", "socket", "httpx", "websockets", "threading", "pickle"}
