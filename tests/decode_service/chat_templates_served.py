"""Both services with one model, whose tokenizer knows the special tokens of all published templates that are tested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decode_service.prompt.chat import ChatComposer
from tests.architectures import ARCHITECTURES, build
from tests.decode_service.models import loaded
from tests.decode_service.pair import Pair, pair
from tests.text.chat_templates import STABLE, template, tokenizer

CONTEXT_LENGTH = 8192
# An answer stays as it was generated, unless the template writes it, or what opened it, otherwise later on.
KEPT = (STABLE | {"idefics3"}) - {"deepseek_r1_distill", "deepseekv3", "glm4moe", "nemotron_3_nano"}


@contextmanager
def services_of_all_templates(folder: Path, store: Path) -> Iterator[Pair]:
    """The services; their model is saved in ``folder``."""
    made = tokenizer("qwen2_5")
    model_type, sizes = ARCHITECTURES["qwen3-ratio2"]
    own = {"vocab_size": len(made), "bos_token_id": None, "eos_token_id": made.eos_token_id, "pad_token_id": 0}
    build(model_type, {**sizes, **own, "max_position_embeddings": CONTEXT_LENGTH}).save_pretrained(folder)
    made.save_pretrained(folder)
    prefill, decode = (loaded(folder, f"{role} of templates") for role in ("prefill", "decode"))
    with pair(prefill, decode, store, kv_pages=2048) as running:
        yield running
        running.check_idle()


@contextmanager
def under(services: Pair, name: str) -> Iterator[None]:
    """With one template in place of the model's own, and nothing remembered."""
    composer, answering = services.decode.composer, services.decode.answering
    before = composer.chats
    composer.chats = answering.chats = ChatComposer(template(name).codec, services.decode.store)
    try:
        yield
    finally:
        composer.chats = answering.chats = before


def likely_words() -> dict[int, float]:
    """Biases to answers of words: their text is their tokens, and nothing else, in every tokenizer."""
    return {token: 100.0 for token in template("qwen2_5").codec.encode("stoneheaptown")}


def oracle(name: str, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """The tokens of a chat, as ``transformers`` makes them."""
    given = messages
    if template(name).in_parts:
        given = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    return list(tokenizer(name).apply_chat_template(given, add_generation_prompt=True, **options)["input_ids"])
