"""Random LoRA adapters of the tiny models, saved as the peft library saves them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import torch
from interpose.runtime.adapter_files import CONFIG
from models import CACHE, tiny
from transformers import AutoModelForCausalLM

TARGETS = {
    "llama": ["q_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gemma3": ["q_proj", "o_proj", "down_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "mamba": ["in_proj"],
}


def lora(arch: str, seed: int = 0, *, targets: Sequence[str] = (), dtype: str = "float32", **config: Any) -> Path:
    """The folder of an adapter whose every part counts; made once for each combination of arguments."""
    base = tiny(arch, dtype=dtype)
    key = json.dumps([arch, seed, list(targets), dtype, config, Path(__file__).read_text(), str(base)])
    folder = CACHE / "adapters" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "init_lora_weights": False, **config}
            torch.manual_seed(seed)
            made = peft.get_peft_model(
                AutoModelForCausalLM.from_pretrained(base),
                peft.LoraConfig(target_modules=list(targets) or TARGETS[arch], **settings),
            )
            for parameter in made.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.2)
            part = Path(scratch, "adapter")
            made.save_pretrained(part)
            # Another process may have been quicker; what it made is the same.
            with suppress(OSError):
                part.rename(folder)
    return folder


def reconfigured(arch: str, into: Path, **settings: Any) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(lora(arch), into)
    config = into / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return into


def stock(arch: str, folder: Path | None = None, *, dtype: str = "float32") -> Any:
    """The model as peft itself runs it with an adapter, or without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tiny(arch, dtype=dtype)).eval().requires_grad_(False)
        return base if folder is None else peft.PeftModel.from_pretrained(base, folder).eval()
