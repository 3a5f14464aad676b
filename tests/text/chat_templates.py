"""Published chat templates, each under a tokenizer that has their special tokens: what real models render with."""

from __future__ import annotations

import functools
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.tokenizer_for_tests import byte_level_tokenizer
from text.chat.template import ChatTemplate
from text.codec import TextCodec

FOLDER = Path(__file__).parent / "templates"
_CHATML = "<|im_start|> <|im_end|>"
_DEEPSEEK = "<｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜>"
SPECIAL = {
    "cohere2": "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> "
    "<|START_RESPONSE|> <|END_RESPONSE|>",
    "deepseek_r1_distill": _DEEPSEEK,
    "deepseekv3": _DEEPSEEK,
    "gemma": "<start_of_turn> <end_of_turn>",
    "gemma3": "<start_of_turn> <end_of_turn>",
    "glm4moe": "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
    "gptoss": "<|start|> <|message|> <|end|> <|channel|> <|call|> <|return|>",
    "idefics3": "<end_of_utterance> <|begin_of_text|>",
    "lfm2_v2": f"{_CHATML} <|tool_list_start|> <|tool_list_end|> <|tool_response_start|> <|tool_response_end|>",
    "llama3": "<|start_header_id|> <|end_header_id|> <|eot_id|>",
    "llama3_1": "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>",
    "nemotron_3_nano": _CHATML,
    "phi3": "<|system|> <|user|> <|assistant|> <|end|>",
    "phi3_5": "<|system|> <|user|> <|assistant|> <|end|>",
    "qwen2_5": _CHATML,
    "qwen3": _CHATML,
    "qwen3_5_think": _CHATML,
    "qwen3_instruct_2507": _CHATML,
}
BOS, EOS = "<s>", "<|endoftext|>"
# Those that render what was said before as it was, whatever follows.
STABLE = frozenset(
    ("cohere2", "deepseekv3", "deepseek_r1_distill", "gemma", "gemma3", "glm4moe", "lfm2_v2", "llama3", "llama3_1")
) | {"nemotron_3_nano", "qwen2_5", "qwen3_instruct_2507"}


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text()


def vocabulary() -> list[str]:
    """The special tokens of all templates."""
    return sorted({BOS, EOS, *(token for tokens in SPECIAL.values() for token in tokens.split())})


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of all templates, and the template of one."""
    made = byte_level_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [AddedToken(each, special=True) for each in vocabulary()]})
    made.bos_token, made.eos_token = BOS, EOS
    made.chat_template = source(name)
    return made


@functools.cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(TextCodec(tokenizer(name), name))
