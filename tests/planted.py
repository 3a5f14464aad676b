"""A model that says what it is told to: of each token it follows which comes next, in a chain of tokens of its own.

What a random model never writes (tool calls, reasoning) is written through the real services by this one. It is a
Qwen3 whose attention and MLP add nothing, so that its last token alone decides; chains share no token but the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.models_for_tests import _SIZES
from tests.tokenizer_for_tests import byte_level_tokenizer

CHAT_TEMPLATE = (
    "{%- if tools -%}{{- '<|system|>' -}}"
    "{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}{{- '<end>' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|' ~ ('document' if message.role == 'tool' else message.role) ~ '|>' -}}"
    "{%- if script and message.role == 'assistant' -%}{{- '<script ' ~ script ~ '>' -}}{%- endif -%}"
    "{%- if message.reasoning_content -%}{{- '<think>' ~ message.reasoning_content ~ '</think>' -}}{%- endif -%}"
    "{{- message.content -}}"
    "{%- for call in message.tool_calls or [] -%}{{- '<tool_call>' ~ "
    "'{\"name\": \"' ~ call.function.name ~ '\", \"arguments\": ' ~ (call.function.arguments | tojson) ~ '}' "
    "~ '</tool_call>' -}}{%- endfor -%}"
    "{{- '<end>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}"
    "{%- if think -%}{{- '<think>\n' -}}{%- endif -%}{%- if thought -%}{{- '<think>\n\n</think>' -}}{%- endif -%}"
    "{%- if script -%}{{- '<script ' ~ script ~ '>' -}}{%- endif -%}{%- endif -%}"
)
HIDDEN = 96


def planted_model_dir(
    path: Path, scripts: Mapping[str, Sequence[str]], *, special: Sequence[str] = (), ends: bool = True
) -> Path:
    """Saves a model that says the pieces of ``scripts[name]`` where its template is given ``script=name``,
    or a message of the assistant that goes on ends with ``<script name>``.

    Each piece is a token of its own, of ``special`` ones a special token; none may come twice. Behind the last piece
    the answer ends, or, unless it ``ends``, that piece comes again and again.
    """
    pieces = [piece for script in scripts.values() for piece in script]
    assert len(set(pieces)) == len(pieces), "a piece that comes twice has two that follow it"
    tokenizer = byte_level_tokenizer()
    opened = [f"<script {name}>" for name in scripts]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in [*opened, *special]])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces if piece not in special])
    tokenizer.chat_template = CHAT_TEMPLATE
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path)
    _model(tokenizer, [[f"<script {name}>", *script] for name, script in scripts.items()], ends).save_pretrained(path)
    return path


def _model(tokenizer: PreTrainedTokenizerFast, chains: Sequence[Sequence[str]], ends: bool) -> Any:
    sizes = {**_SIZES, "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "tie_word_embeddings": False}
    model: Any
    config = AutoConfig.for_model("qwen3", **{**sizes, "max_position_embeddings": 2048})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        words = torch.nn.functional.normalize(torch.randn(len(tokenizer), HIDDEN), dim=1)
        model.get_input_embeddings().weight.copy_(words)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head = model.get_output_embeddings().weight.zero_()
        for chain in chains:
            ids = [tokenizer.convert_tokens_to_ids(piece) for piece in chain]
            last = tokenizer.eos_token_id if ends else ids[-1]
            for token, following in zip(ids, [*ids[1:], last], strict=True):
                head[following] += words[token]
    return model
