"""Plain ``transformers`` generation, which the demonstration compares with: no line of it is shared with Cairn."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


class PlainModel:
    """A model in fp32 with eager attention on the CPU."""

    def __init__(self, path_or_id: str, threads: int) -> None:
        """Load it. Raises ``OSError`` if there is no such model. ``threads`` holds for the whole process."""
        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path_or_id)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            path_or_id, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation that the assistant is to answer."""
        encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    @torch.inference_mode()
    def answer(self, prompt: list[int], tokens_max: int) -> list[int]:
        """The greedy continuation, without the end token."""
        row = torch.tensor([prompt])
        output = self._model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=tokens_max
        )
        return self.without_end(output[0, len(prompt) :].tolist())

    def without_end(self, token_ids: list[int]) -> list[int]:
        """Token ids up to the end token."""
        end = self._tokenizer.eos_token_id
        return token_ids[: token_ids.index(end)] if end in token_ids else token_ids
