"""Random models with windows, saved as directories, and services that know of them or keep everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.served import ServedModel
from engine.sight import EVERYTHING
from serving.process.loading import Loaded
from tests.architectures import build
from tests.decode_service.models import CONTEXT_LENGTH, TOKENS_OF_TESTS, loaded
from tests.tokenizer_for_tests import byte_level_tokenizer

WINDOW = 32
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

# Models in which every layer has a window, so that pages go, and models in which one sees everything.
ALL_WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", HEADS | {"sliding_window": WINDOW}),
    "phi3": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": WINDOW}),
    "llama4-blocks": (
        "llama4_text",
        HEADS | {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 96},
    ),
}
SOME_WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", HEADS | {"sliding_window": WINDOW}),
    "gemma3": ("gemma3_text", HEADS | {"sliding_window": WINDOW, "layer_types": ALTERNATING}),
    "gpt-oss": (
        "gpt_oss",
        HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
}
MODELS = ALL_WINDOWS | SOME_WINDOWS


def windowed_dir(path: Path, name: str, **settings: Any) -> Path:
    model_type, of_model = MODELS[name]
    build(
        model_type, {"max_position_embeddings": CONTEXT_LENGTH, **of_model, **settings, **TOKENS_OF_TESTS}
    ).save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return path


def both(folder: Path) -> tuple[Loaded, Loaded]:
    """For a prefill and a decode service."""
    return loaded(folder, "prefill"), loaded(folder, "decode")


def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services that are made from here on give nothing back before a request's end."""
    monkeypatch.setattr(ServedModel, "sight", EVERYTHING)
