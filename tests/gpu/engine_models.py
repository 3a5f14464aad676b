"""Small random models of real geometries in bf16 on the device, and their fp32 twins for the oracle."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.families import FAMILIES
from bench.gpu_model import SHAPE, random_model
from bench.moe import MOE_SHAPE
from engine.model.borrowed import BorrowedModel
from engine.served import ServedModel, look_into, serve
from tests.architectures import build

torch.set_num_threads(1)  # the oracle runs on the CPU, and tests run side by side

# name -> (transformers model type, configuration)
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-ratio4-128": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}),
    "qwen2-ratio7-64": ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}),
    "llama-ratio8-64": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64}),
    "llama-ratio1-64": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}),
    "phi3-ratio2-64": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}),
    "qwen3moe-ratio4-128": (
        "qwen3_moe",
        {
            **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "mlp_only_layers": [1]},
            **{"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 72, "norm_topk_prob": True},
        },
    ),
    "mixtral-ratio2-64": ("mixtral", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}),
}
FUSED = tuple(name for name in GEOMETRIES if not name.startswith("phi3"))


def has_experts(name: str) -> bool:
    return GEOMETRIES[name][0] in ("qwen3_moe", "mixtral")


_PLAIN = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256}
_WINDOW = {"sliding_window": 32}
_TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Of every family that runs its own code in captured steps, with the windows and heads that it is known for.
CAPTURED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", _PLAIN | _WINDOW),
    "gemma3": ("gemma3_text", _PLAIN | _WINDOW | _TYPES),
    "phi3": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 384}),  # heads of 96
    "olmo2": ("olmo2", _PLAIN),
    "granite": ("granite", _PLAIN),
    "starcoder2": ("starcoder2", _PLAIN | {"sliding_window": None}),
    "cohere2": ("cohere2", _PLAIN | _WINDOW | _TYPES),
    "gpt-oss": ("gpt_oss", _PLAIN | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64},
            **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 4},
            **{
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 64,
                "hidden_size": 256,
            },
        },
    ),
}


@functools.cache
def twins(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in fp32 with weights that bf16 holds exactly, and the same in bf16; both on the CPU.

    Matrices are scaled to the width: in a wide model of large weights bf16 alone moves logits by their deviation.
    """
    kind, settings = {**GEOMETRIES, **CAPTURED}[name]
    model = build(kind, {**settings, "max_position_embeddings": 4096})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_((64 / model.config.hidden_size) ** 0.5)
    model = model.to(torch.bfloat16)
    return copy.deepcopy(model).float(), model


@functools.cache
def served(name: str, *, piece_tokens: int = 24) -> ServedModel:
    """The bf16 twin, served on the device."""
    model = copy.deepcopy(twins(name)[1]).to("cuda")
    return serve(BorrowedModel(model, name=name), piece_tokens=piece_tokens)


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@functools.cache
def wide() -> ServedModel:
    """Two layers in the widths of Qwen3-8B, made on the device: products of the real shapes."""
    return _wide("qwen3", SHAPE)


@functools.cache
def wide_experts() -> ServedModel:
    """Two layers in the widths of Qwen3-30B-A3B: 128 experts, 8 a token."""
    return _wide("qwen3_moe", MOE_SHAPE)


@functools.cache
def wide_routers() -> ServedModel:
    """A dense layer and one of experts as DeepSeek-V3 has them, in V2-Lite's widths: routers in single precision."""
    kind, shape = FAMILIES["deepseek"]
    return _wide(kind, shape)


def _wide(family: str, shape: dict[str, Any]) -> ServedModel:
    borrowed = random_model(family, {**shape, "num_hidden_layers": 2, "vocab_size": 4096})
    return look_into(borrowed, piece_tokens=8192)
