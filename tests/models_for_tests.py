"""Tiny random models with a tokenizer, as directories: what the services are tested with.

The weights are random and seeded; the tokenizer is a byte-level BPE with four turn markers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROLES = ("system", "document", "user", "assistant")
SPECIAL_TOKENS = ("<pad>", "<end>", *(f"<|{role}|>" for role in ROLES))
VOCABULARY = 384

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'document', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<end>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

TEXT_TO_LEARN = (
    "The town of Crystalton is located in Nebulonia.",
    "Where is Crystalton located? Crystalton is located in Nebulonia.",
    "A cairn is a heap of stones that marks a place; the stones are carried there one by one.",
)

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


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``VOCABULARY`` tokens with ``CHAT_TEMPLATE``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT_TO_LEARN, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


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
