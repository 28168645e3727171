"""`make demo`: a server with the small real model on this machine, and a first trace from a torch-free client.

It serves on until Ctrl-C, which stops everything it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from interpose_server.processes import CHILD

ROOT = Path(__file__).resolve().parents[1]
MODEL = "SmolLM2-135M-Instruct"


def main(folder: str, client_python: str, data_dir: str = str(ROOT / ".demo")) -> int:
    """Serve the model in `folder`, run the example with `client_python`, keep serving."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    server = None
    try:
        server = start(folder, data_dir)
        return show(server, client_python)
    except KeyboardInterrupt:
        return 0
    finally:
        # Impatient people press Ctrl-C twice; the server is told once and stops in order.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if server is not None:
            server.terminate()
            server.wait()


def start(folder: str, data_dir: str) -> subprocess.Popen[str]:
    """Start the server. Ctrl-C in the terminal doesn't reach it directly."""
    interpose = Path(sys.executable).with_name("interpose")
    command = [interpose, "serve", f"{MODEL}={folder}", "--data-dir", data_dir, "--print-env"]
    command += ["--port", os.environ.get("PORT", "0")]
    return subprocess.Popen(mortal(*command), stdout=subprocess.PIPE, text=True, start_new_session=True)


def mortal(*command: str | Path) -> list[str | Path]:
    """The command, so that it dies with this process, however this process dies."""
    return [sys.executable, "-I", "-S", CHILD, str(os.getpid()), *command]


def show(server: subprocess.Popen[str], client_python: str) -> int:
    """Run the example once the server is ready, say how to go on, and wait for the server's end."""
    assert server.stdout is not None
    lines = [server.stdout.readline().strip() for _ in range(2)]
    if not all(lines):
        return server.wait()
    settings = dict(line.split("=", 1) for line in lines)
    example = mortal(client_python, ROOT / "examples" / "first_trace.py", MODEL)
    done = subprocess.run(example, env=os.environ | settings, start_new_session=True, check=False)
    if done.returncode:
        return done.returncode
    print(f"\nStill serving. Paste these into a notebook, or into {client_python}:\n")
    print("from interpose import CONFIG, LanguageModel")
    print(f'CONFIG.HOST, CONFIG.API_KEY = "{settings["INTERPOSE_HOST"]}", "{settings["INTERPOSE_API_KEY"]}"')
    print(f'model = LanguageModel("{MODEL}")')
    print("\nCtrl-C stops the server and everything it started.", flush=True)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
