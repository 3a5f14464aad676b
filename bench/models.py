"""The models that benchmarks run on: the shipped one, and random ones of a real model's shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.model.dtype import choose_dtype

FABLE = Path(__file__).parent.parent / "models" / "fable"

QWEN3_0_6B: dict[str, Any] = {
    **{"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960},
    **{"tie_word_embeddings": True, "rope_theta": 1000000.0},
}


@dataclass(frozen=True)
class BenchModel:
    """A model directory, the dtype it is served in, and the vocabulary that random prompts are drawn from."""

    name: str
    path: Path
    dtype: str
    vocabulary: int

    def prompt(self, tokens: int, seed: int) -> list[int]:
        """Random token ids; the first hundred ids are left out, special tokens live there."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(100, self.vocabulary, (tokens,), generator=generator).tolist()


def fable() -> BenchModel:
    """The shipped model in float32, the faster dtype for its size."""
    return BenchModel("fable (5 M, float32)", FABLE, "float32", 2000)


def qwen3_shape(folder: Path) -> BenchModel:
    """A random model of Qwen3-0.6B's shape, saved into ``folder`` in bfloat16, in the dtype that a service would take.

    It has no tokenizer.
    """
    path = folder / "qwen3-0.6b-shape"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **QWEN3_0_6B), dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    dtype = choose_dtype("bfloat16", model.num_parameters(), "cpu").dtype
    return BenchModel(f"Qwen3-0.6B shape ({dtype})", path, dtype, QWEN3_0_6B["vocab_size"])


def random_model(kind: str, settings: dict[str, Any], *, deviation: float) -> PreTrainedModel:
    """A random model of three narrow layers in float32, with matrices of that deviation; seeded."""
    shape = {"vocab_size": 1009, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape, max_position_embeddings=512, pad_token_id=0, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, deviation)
    return model.eval()
