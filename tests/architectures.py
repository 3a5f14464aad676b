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

NAMED = tuple(ARCHITECTURES)[:10]

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
    """One of ``ARCHITECTURES``, ``EXACT_ONLY`` or ``REFUSED``, built once a process."""
    return build(*{**ARCHITECTURES, **EXACT_ONLY, **REFUSED}[name])
