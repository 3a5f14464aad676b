"""Small random models of real geometries in bf16 on the device, and their fp32 twins for the oracle."""

from __future__ import annotations

import copy
import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.gpu_model import SHAPE
from engine.model.borrowed import BorrowedModel
from engine.served import ServedModel, look_into, serve
from tests.architectures import build

torch.set_num_threads(1)  # the oracle runs on the CPU, and tests run side by side

# name -> (transformers model type, configuration)
GEOMETRIES = {
    "qwen3-ratio4-128": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}),
    "qwen2-ratio7-64": ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}),
    "llama-ratio8-64": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64}),
    "llama-ratio1-64": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}),
    "phi3-ratio2-64": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}),
}
FUSED = tuple(GEOMETRIES)[:4]


@functools.cache
def twins(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in fp32 with weights that bf16 holds exactly, and the same in bf16; both on the CPU.

    Matrices are scaled to the width: in a wide model of large weights bf16 alone moves logits by their deviation.
    """
    kind, settings = GEOMETRIES[name]
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
    config = AutoConfig.for_model("qwen3", **{**SHAPE, "num_hidden_layers": 2, "vocab_size": 4096})
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    module.to_empty(device="cuda")
    module.model.rotary_emb = type(module.model.rotary_emb)(config).to("cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.normal_(1.0, 0.02)
    return look_into(BorrowedModel(module, name="wide"), piece_tokens=8192)
