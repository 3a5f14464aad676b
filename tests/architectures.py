"""Small random models of many architectures, built by transformers from configurations."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SMALL = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _heads(heads: int, kv_heads: int, head_dim: int = 16) -> dict[str, Any]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN = {"factor": 8.0, "original_max_position_embeddings": 64}

_LONGROPE = _rope("longrope", short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[4.0] * 8) | {
    **{"max_position_embeddings": 512, "original_max_position_embeddings": 256}
}

# name -> (transformers model type, configuration). The first ten are the architectures the README names.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-ratio2": ("qwen3", _heads(4, 2)),
    "qwen3-ratio4": ("qwen3", _heads(8, 2)),
    "qwen2-ratio7": ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 224}),
    "llama-ratio8": ("llama", _heads(8, 1)),
    "llama-ratio1": ("llama", _heads(4, 4)),
    "llama-llama3": ("llama", _heads(4, 2) | _rope("llama3", **_LLAMA3)),
    "llama-yarn": ("llama", _heads(4, 2) | _rope("yarn", **_YARN)),
    "mistral": ("mistral", _heads(4, 2) | {"sliding_window": None}),
    "phi3": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "gemma": ("gemma", _heads(4, 1)),
    "llama-linear": ("llama", _heads(4, 2) | _rope("linear", factor=4.0)),
    "phi3-partial": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "gemma2-softcap": ("gemma2", _heads(4, 2)),
    "gemma3-two-ropes": ("gemma3_text", _heads(4, 2)),
    "stablelm": ("stablelm", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "gpt-neox": ("gpt_neox", {"num_attention_heads": 4}),
    "cohere-interleaved": ("cohere", _heads(4, 2)),
    "cohere2-some-nope": ("cohere2", _heads(4, 2)),
    "glm-interleaved": ("glm", _heads(4, 2)),
    "olmo2": ("olmo2", _heads(4, 2)),
    "smollm3-some-nope": ("smollm3", _heads(4, 2)),
    "granite": ("granite", _heads(4, 2)),
    "starcoder2": ("starcoder2", _heads(4, 2)),
    "hunyuan-norm-after-rope": ("hunyuan_v1_dense", _heads(4, 2)),
    "mixtral-moe": ("mixtral", _heads(4, 2)),
    "gpt-oss-sinks": ("gpt_oss", _heads(4, 2) | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama-dynamic": ("llama", _heads(4, 2) | _rope("dynamic", factor=4.0)),
    "phi3-longrope": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 4} | _LONGROPE),
    "deepseek-v3-mla": (
        "deepseek_v3",
        {
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
            **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4},
            **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32},
        },
    ),
}

_WINDOW = {"sliding_window": 20}
_SOME = ["sliding_attention", "full_attention", "sliding_attention"]
_FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERTS = {"n_routed_experts": 4, "num_local_experts": 4, "num_experts": 4, **_FEW}
_MLA = {
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
}
_GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_SHARED = {"shared_expert_intermediate_size": 32, "shared_intermediate_size": 32}

# More of them, of which less is tried by default; windows are short, so that prompts of the tests are longer.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe-windows": ("afmoe", _heads(4, 2) | _EXPERTS | _WINDOW | {"layer_types": _SOME}),
    "apertus": ("apertus", _heads(4, 2)),
    "arcee": ("arcee", _heads(4, 2)),
    "aria-moe": ("aria_text", _heads(4, 2) | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "bitnet": ("bitnet", _heads(4, 2)),
    "cohere2-moe": ("cohere2_moe", _heads(4, 2) | _EXPERTS | _WINDOW | {"layer_types": _SOME}),
    "cwm-windows": ("cwm", _heads(4, 2) | _WINDOW | {"layer_types": _SOME}),
    "deepseek-v2-mla": ("deepseek_v2", _MLA | _EXPERTS | _GROUPS),
    "dots1-windows": ("dots1", _heads(4, 2) | _EXPERTS | _GROUPS | _WINDOW | {"layer_types": _SOME}),
    "ernie": ("ernie4_5", _heads(4, 2)),
    "ernie-moe": ("ernie4_5_moe", _heads(4, 2) | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "exaone-moe": ("exaone_moe", _heads(4, 2) | _EXPERTS | _GROUPS | _WINDOW | {"layer_types": _SOME}),
    "flex-olmo": ("flex_olmo", _heads(4, 2) | _EXPERTS),
    "gemma3n-shared-kv": (
        "gemma3n_text",
        {
            **_heads(4, 2),
            **{"num_hidden_layers": 6, "num_kv_shared_layers": 2, "sliding_window": 20, "laurel_rank": 8},
            **{"layer_types": ["sliding_attention", "full_attention"] * 3, "activation_sparsity_pattern": [0.0] * 6},
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 211},
        },
    ),
    "gemma4-shared-kv": (
        "gemma4_text",
        {
            **_heads(4, 2),
            **{"num_hidden_layers": 6, "num_kv_shared_layers": 2, "sliding_window": 20, "global_head_dim": 32},
            **{"layer_types": ["sliding_attention", "full_attention"] * 3, "num_global_key_value_heads": 1},
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 211},
        },
    ),
    "glm4-norms": ("glm4", _heads(4, 2)),
    "glm4-moe": ("glm4_moe", _heads(4, 2) | _EXPERTS | _GROUPS),
    "glm4-moe-lite-mla": ("glm4_moe_lite", _MLA | _EXPERTS | _GROUPS),
    "granite-moe": ("granitemoe", _heads(4, 2) | _EXPERTS),
    "granite-hybrid-without-mamba": (
        "granitemoehybrid",
        _heads(4, 2) | _EXPERTS | _SHARED | {"layer_types": ["attention"] * 3},
    ),
    "helium": ("helium", _heads(4, 2)),
    "hunyuan-moe": ("hunyuan_v1_moe", _heads(4, 2) | {"num_experts": 4, "moe_topk": 2, "num_shared_expert": 1}),
    "internlm3": ("internlm3", _heads(4, 2)),
    "jetmoe": ("jetmoe", _EXPERTS | {"num_key_value_heads": 2, "kv_channels": 16}),
    "mellum-windows": ("mellum", _heads(4, 2) | _EXPERTS | _WINDOW | {"layer_types": _SOME}),
    "mimo-windows-and-sinks": ("mimo_v2_flash", _heads(4, 2) | _EXPERTS | _GROUPS | _WINDOW | {"layer_types": _SOME}),
    "minicpm3-mla": ("minicpm3", _MLA),
    "minimax-m2": ("minimax_m2", _heads(4, 2) | _EXPERTS),
    "ministral-windows": ("ministral", _heads(4, 2) | _WINDOW),
    "modernbert-decoder": ("modernbert-decoder", {"num_attention_heads": 4, "local_attention": 40}),
    "nemotron": ("nemotron", _heads(4, 2)),
    "olmo": ("olmo", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "olmo3-windows": ("olmo3", _heads(4, 2) | _WINDOW | {"layer_types": _SOME}),
    "olmoe": ("olmoe", _heads(4, 2) | _EXPERTS),
    "persimmon": ("persimmon", {"num_attention_heads": 4}),
    "phi": ("phi", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "phimoe-windows": ("phimoe", {"num_attention_heads": 4, "num_key_value_heads": 2} | _EXPERTS | _WINDOW),
    "qwen2-some-windows": (
        "qwen2",
        {
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 20},
            **{"max_window_layers": 2},
        },
    ),
    "qwen2-moe": ("qwen2_moe", {"num_attention_heads": 4, "num_key_value_heads": 2} | _EXPERTS | _SHARED),
    "qwen3-moe": ("qwen3_moe", _heads(4, 2) | _EXPERTS),
    "seed-oss": ("seed_oss", _heads(4, 2)),
    "solar-open": ("solar_open", _heads(4, 2) | _EXPERTS | _GROUPS),
    "vaultgemma-windows": ("vaultgemma", _heads(4, 2) | _WINDOW),
    "youtu-mla": ("youtu", _MLA),
}

NAMED = tuple(ARCHITECTURES)[:10]

# Of ``MORE`` those whose attention is that of others: tried with -m slow.
RARE = (
    *("apertus", "arcee", "aria-moe", "bitnet", "dots1-windows", "ernie", "flex-olmo", "helium", "hunyuan-moe"),
    *("internlm3", "jetmoe", "minicpm3-mla", "minimax-m2", "nemotron", "olmo", "persimmon", "seed-oss", "solar-open"),
    *("youtu-mla",),
)

REFUSED = {
    "mamba": ("mamba", {}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 3}),
    "falcon": ("falcon", {"num_attention_heads": 4}),
    "minimax-linear-attention": ("minimax", _heads(4, 2)),
}

EXACT_ONLY = {
    "gpt2-learned-positions": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
}


def build(model_type: str, settings: dict[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in eval mode; weights large enough that attention matters to the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_SMALL, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    return model.eval()


@functools.cache
def build_named(name: str) -> PreTrainedModel:
    """One of ``ARCHITECTURES``, ``MORE``, ``EXACT_ONLY`` or ``REFUSED``, built once a process."""
    return build(*{**ARCHITECTURES, **MORE, **EXACT_ONLY, **REFUSED}[name])
