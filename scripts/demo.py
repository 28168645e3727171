"""`make demo`: a server with the small real model on this machine, and a first trace from a torch-free client.

It serves on until Ctrl-C, which stops everything it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "SmolLM2-135M-Instruct"


def main(folder: str, client_python: str) -> int:
    """Serve the model in `folder`, run the example with `client_python`, keep serving."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = [Path(sys.executable).with_name("interpose"), "serve", f"{MODEL}={folder}"]
    options = ["--port", os.environ.get("PORT", "0"), "--data-dir", ROOT / ".demo", "--print-env"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        return _show(server, client_python)
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        server.wait()


def _show(server: subprocess.Popen[str], client_python: str) -> int:
    assert server.stdout is not None
    lines = [server.stdout.readline().strip() for _ in range(2)]
    if not all(lines):
        return server.wait()
    settings = dict(line.split("=", 1) for line in lines)
    subprocess.run(
        [client_python, ROOT / "examples" / "first_trace.py", MODEL], env=os.environ | settings, check=True
    )
    print("\nStill serving. In a notebook:\n")
    print("    from interpose import CONFIG, LanguageModel")
    print(f'    CONFIG.HOST, CONFIG.API_KEY = "{settings["INTERPOSE_HOST"]}", "{settings["INTERPOSE_API_KEY"]}"')
    print(f'    model = LanguageModel("{MODEL}")')
    print("\nCtrl-C stops the server and everything it started.", flush=True)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
