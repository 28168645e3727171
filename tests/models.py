"""Tiny random models of real architectures, saved as ordinary model folders.

Weights have a fixed seed and a scale at which every part matters: attention is far from uniform, and no block is
lost beside the residual stream. Sizes are chosen to differ from one another, so that a mix-up shows.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tiny"

TEXT = """The capital of France is Paris, and the capital of Italy is Rome.
When Mary and John went to the store, John gave a drink to Mary.
After Tom and James went to the park, James handed the ball to Tom.
The Eiffel Tower is in the city of Paris; the Colosseum is in the city of Rome.
A quick brown fox jumps over the lazy dog while the sun sets behind the hills.
She said that 12 of the 345 books weren't hers, didn't she? "No," he answered, "they're mine!"
Once upon a time there was a small model which learned to read the words inside itself.
def add(first, second):
    return first + second
Ein naïver Schüler aß süße Äpfel im Café. Ça va? 你好, 世界.
"""

_SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
_WIDE = _SIZES | {"intermediate_size": 112}
_GROUPED = _WIDE | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 12}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]

_VISION = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80},
    **{"image_size": 24, "patch_size": 8},
}
_TEXT = _WIDE | {"num_hidden_layers": 2, "projection_dim": 40}
_IMAGE = "<image>"

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 112, "n_positions": 128}),
    "llama": ("LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", _GROUPED | {"sliding_window": 12}),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 24}),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA | {"layer_types": _PATTERN}),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA | {"layer_types": _PATTERN}),
    "neox": ("GPTNeoXForCausalLM", _WIDE),
    "opt": ("OPTForCausalLM", _SIZES | {"ffn_dim": 112, "word_embed_proj_dim": 64}),
    "phi": ("PhiForCausalLM", _WIDE),
    "mixtral": ("MixtralForCausalLM", _GROUPED | {"num_local_experts": 5}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "falcon": ("FalconForCausalLM", _SIZES | {"ffn_hidden_size": 112}),
    "bert": ("BertForMaskedLM", _WIDE),
    "granite": ("GraniteForCausalLM", _GROUPED | {"residual_multiplier": 0.3, "embedding_multiplier": 5.0}),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED),
    "phi3": ("Phi3ForCausalLM", _GROUPED),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 80}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _GROUPED | _EXPERTS | {"head_dim": 24, "norm_topk_prob": True}),
    "mamba": ("MambaForCausalLM", {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}),
    "mpt": ("MptForCausalLM", {"d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}),
}
"""Short name -> class of the model, and the sizes that make it tiny: models that continue or fill in texts."""

BEYOND: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            **{"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8, "num_heads": 8, "head_dim": 16},
            **{"n_groups": 2, "chunk_size": 8},
        },
    ),
    "falcon_mamba": ("FalconMambaForCausalLM", {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}),
    "bert_base": ("BertModel", _WIDE),
    "bert_classes": ("BertForSequenceClassification", _WIDE | {"num_labels": 3}),
    "roberta": ("RobertaForTokenClassification", _WIDE | {"num_labels": 3, "max_position_embeddings": 130}),
    "vit": ("ViTModel", _VISION),
    "vit_classes": ("ViTForImageClassification", _VISION | {"num_labels": 5}),
    "clip": ("CLIPModel", {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 40}),
    "clip_vision": ("CLIPVisionModel", _VISION),
    "clip_text": ("CLIPTextModel", _TEXT),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": _GROUPED | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model"},
            "vision_feature_layer": -1,
        },
    ),
    "gemma3_images": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _GEMMA | {"layer_types": _PATTERN},
            "vision_config": _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "mm_tokens_per_image": 9,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _GROUPED
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
            "vision_config": {"depth": 2, "embed_dim": 48, "hidden_size": 64, "num_heads": 3, "patch_size": 4},
        },
    ),
}
"""The same for models of other kinds: other heads, images, images and texts, further state spaces."""

_END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
_BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_SPECIAL = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "gemma2": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"},
    "gemma3": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"},
    "opt": {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>"},
    "bert": _BERT | {"mask_token": "[MASK]"},
}
_STARTS = {"llama", "mistral", "mixtral", "gemma2", "gemma3", "opt", "llava", "gemma3_images"}
_SPECIAL |= dict.fromkeys(("bert_base", "bert_classes", "roberta"), _BERT)
_SPECIAL |= {"clip": _LLAMA, "clip_text": _LLAMA}
_SPECIAL |= {"llava": _LLAMA | {"image_token": _IMAGE}, "qwen2_vl": _END | {"image_token": _IMAGE}}
_SPECIAL |= {"gemma3_images": _SPECIAL["gemma3"] | {"image_token": _IMAGE}}


def tiny(arch: str, *, dtype: str = "float32", **overrides: Any) -> Path:
    """The folder of a tiny model, named `tiny-<arch>`; made once for each combination of arguments.

    Args:
        arch: a key of `ARCHITECTURES` or `BEYOND`.
        dtype: of the saved weights.
        overrides: fields of the model's config.
    """
    sources = (Path(__file__).read_text(), torch.__version__, transformers.__version__)
    key = json.dumps([arch, dtype, overrides, *sources], sort_keys=True)
    folder = CACHE / hashlib.sha256(key.encode()).hexdigest()[:16] / f"tiny-{arch}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            part = Path(scratch, "model")
            _build(arch, dtype, overrides, part)
            # Another process may have been quicker; what it made is the same.
            with suppress(OSError):
                part.rename(folder)
    return folder


def _build(arch: str, dtype: str, overrides: dict[str, Any], folder: Path) -> None:
    cls_name, sizes = (ARCHITECTURES | BEYOND)[arch]
    tokenizer = _tokenizer(arch)
    cls = getattr(transformers, cls_name)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = cls.config_class(**_sized({**sizes, **overrides}, {"vocab_size": len(tokenizer), **ids}, tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # Mamba's time steps stay as they begin
        model = cls(config)
    liven(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # For some architectures the library reads a folder with rules of its own; the file should hold what it uses.
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def _sized(sizes: dict[str, Any], text: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A config's fields, with what concerns the vocabulary where the config keeps it."""
    if "text_config" not in sizes:
        return {**text, **sizes}
    image = {}
    if _IMAGE in tokenizer.get_vocab():
        token = tokenizer.convert_tokens_to_ids(_IMAGE)
        image = {"image_token_id": token, "image_token_index": token}
    return {**sizes, **image, "text_config": {**text, **sizes["text_config"]}}


@torch.no_grad()
def liven(model: nn.Module, seed: int = 0) -> None:
    """Replace a fresh model's weights by random ones at which no part of it is degenerate."""
    generator = torch.Generator().manual_seed(seed)
    done: set[nn.Parameter] = set()
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if param in done:
                continue  # a head tied to the embedding
            done.add(param)
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim < 2:
                # Biases lie around 0, and norms around the neutral value the library gave them.
                param.add_(noise, alpha=0.2)
            elif isinstance(module, nn.Embedding):
                param.copy_(noise * 0.3)
            else:
                fan_in = param.shape[0 if isinstance(module, Conv1D) else -1]
                param.copy_(noise * 1.5 / fan_in**0.5)


@cache
def _bpe(special: tuple[str, ...]) -> str:
    """A byte-level BPE trained on `TEXT`, as the JSON of the tokenizers library."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return tokenizer.to_str()


def _tokenizer(arch: str) -> Any:
    """Special tokens as the architecture has them: some start every text, some have no pad token."""
    special = _SPECIAL.get(arch, _END)
    tokenizer = Tokenizer.from_str(_bpe(tuple(dict.fromkeys(special.values()))))
    around = ("[CLS]", "[SEP]") if arch == "bert" else (special["bos_token"], "") if arch in _STARTS else None
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{around[0]} $A {around[1]}".strip(),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in around if token],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)
