"""Make an environment for each library we stand beside: `install.py [NAME ...]`, all of them without a name.

They are in `.venv-peers/`, apart from ours and from one another. Each borrows our torch, so that none brings a
build of its own and all compute with the same one, and has our transformers library's version.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv-peers"
PEERS = {"nnsight": "nnsight==0.8.1", "transformer_lens": "transformer-lens==4.3.0", "pyvene": "pyvene==0.1.8"}
BORROWED = ("torch", "torchgen", "functorch", "torch-*.dist-info")


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, whether it is there or not."""
    return ENVIRONMENTS / name / "bin" / "python"


def install(name: str) -> None:
    """Does nothing if the environment is there and whole."""
    folder = ENVIRONMENTS / name
    done = folder / ".installed"
    if done.exists() and done.read_text() == PEERS[name] and python_of(name).exists():
        return
    print(f"making {folder.relative_to(ROOT)} ...", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    borrow(folder)
    pip = [python_of(name), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    held = [f"{package}=={version(package)}" for package in ("torch", "transformers", "numpy")]
    subprocess.run([*pip, PEERS[name], *held], check=True, stdout=sys.stderr)
    done.write_text(PEERS[name])


def borrow(folder: Path) -> None:
    """Put our torch on the environment's path, its metadata too: pip takes it for installed."""
    ours, lent = Path(torch.__file__).parents[1], folder / "lent"
    lent.mkdir()
    for pattern in BORROWED:
        for found in ours.glob(pattern):
            (lent / found.name).symlink_to(found)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(f"{lent}\n")


def version(package: str) -> str:
    from importlib.metadata import version as found

    return found(package)


if __name__ == "__main__":
    os.environ.pop("PIP_CONSTRAINT", None)
    for wanted in sys.argv[1:] or PEERS:
        install(wanted)
