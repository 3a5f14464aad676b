"""Tiny random models with a tokenizer, as directories: what the services are tested with.

The weights are random and seeded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tokenizer_for_tests import VOCABULARY, byte_level_tokenizer

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny_model_dir(path: Path, arch: str = "qwen3", *, seed: int = 0, tokenizer: bool = True, **config: Any) -> Path:
    """Saves a tiny random model of ``arch`` (a ``model_type`` of transformers) to ``path`` and returns it.

    ``config`` overrides fields of the configuration; ``tokenizer=False`` leaves the tokenizer out.
    """
    path.mkdir(parents=True, exist_ok=True)
    made = AutoConfig.for_model(arch, **{**_SIZES, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    model.save_pretrained(path)
    if tokenizer:
        byte_level_tokenizer().save_pretrained(path)
    return path
