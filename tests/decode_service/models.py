"""Random models whose answers depend on their whole context, saved as directories with a tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from serving.process.loading import Loaded, load
from serving.process.options import ServiceOptions
from tests.architectures import ARCHITECTURES, EXACT_ONLY, build
from tests.tokenizer_for_tests import VOCABULARY, byte_level_tokenizer

CONTEXT_LENGTH = 2048
TOKENS_OF_TESTS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def model_dir(path: Path, name: str = "qwen3-ratio2", *, seed: int = 0) -> Path:
    """Saves the architecture ``name`` with the vocabulary of the test tokenizer; weights as in the engine's tests."""
    model_type, settings = {**ARCHITECTURES, **EXACT_ONLY}[name]
    model = build(model_type, {"max_position_embeddings": CONTEXT_LENGTH, **settings, **TOKENS_OF_TESTS}, seed=seed)
    model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return path


@functools.cache
def loaded(folder: Path, role: str, prefill_tokens_max: int = 64, dtype: str = "auto") -> Loaded:
    """The model as a service has it. Each ``role`` has its own: a model runs in one thread only."""
    return load(
        ServiceOptions(
            model=str(folder), store="", model_name="tiny", prefill_tokens_max=prefill_tokens_max, dtype=dtype
        )
    )


@functools.cache
def oracle_model(folder: Path) -> PreTrainedModel:
    """The same model for ``tests.oracle``."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(seed: int, count: int) -> list[int]:
    """Random token ids, none of them special."""
    return torch.randint(10, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
