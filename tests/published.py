"""Configs of well-known models, from what their makers published, and how many parameters they say these have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LLAMA3 = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "dtype": "bfloat16"},
    **{"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05},
}
_QWEN = {
    **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16"},
    **{"num_key_value_heads": 8, "max_position_embeddings": 32768},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024},
        **{"n_embd": 768, "n_layer": 12, "n_head": 12, "dtype": "float32"},
    },
    "Llama-3.2-1B": _LLAMA3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"head_dim": 64, "tie_word_embeddings": True},
    "Llama-3.1-8B": _LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Gemma-2-9B": {
        **{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000, "head_dim": 256},
        **{"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16},
        **{"num_key_value_heads": 8, "max_position_embeddings": 8192, "sliding_window": 4096, "dtype": "bfloat16"},
    },
    "Gemma-2-27B": {
        **{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000, "head_dim": 128},
        **{"hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32},
        **{"num_key_value_heads": 16, "max_position_embeddings": 8192, "sliding_window": 4096, "dtype": "bfloat16"},
    },
    "Qwen2.5-32B": _QWEN
    | {"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
    | {"num_attention_heads": 40},
    "Mixtral-8x7B": {
        **{
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
        },
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"dtype": "bfloat16", "num_key_value_heads": 8, "num_local_experts": 8, "max_position_embeddings": 32768},
    },
    "Llama-3.1-70B": _LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "Mixtral-8x22B": {
        **{
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 6144,
        },
        **{"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48},
        **{"dtype": "bfloat16", "num_key_value_heads": 8, "num_local_experts": 8, "max_position_embeddings": 65536},
    },
    "Llama-3.1-405B": _LLAMA3
    | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "DeepSeek-R1": {
        **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280},
        **{"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61},
        **{"num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1},
        **{
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
        },
        **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
        **{"max_position_embeddings": 163840, "dtype": "bfloat16"},
        "quantization_config": {
            **{
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            }
        },
    },
}

PARAMETERS = {
    "gpt2": 124_439_808,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-2-27B": 27_227_128_320,
    "Qwen2.5-32B": 32_763_876_352,
    "Mixtral-8x7B": 46_702_792_704,
    "Llama-3.1-70B": 70_553_706_496,
    "Mixtral-8x22B": 140_620_634_112,
    "Llama-3.1-405B": 405_853_388_800,
    "DeepSeek-R1": 671_026_419_200,
}
"""As their makers or the hub count them; of DeepSeek-R1 without the layer that predicts a further token, which the
library doesn't load."""


FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "published"


def written(name: str, folder: Path = FOLDER) -> Path:
    """A folder with nothing but a model's config."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    file, text = target / "config.json", json.dumps(CONFIGS[name])
    # Left alone where it is as it should be: what was told of it may be kept by its time.
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return target
