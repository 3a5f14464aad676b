"""Text to token ids and back: one fast tokenizer, its chat template one turn at a time, and text as it streams.

A chunk is one text or one turn, tokenized by itself, so what it becomes must not depend on its neighbours. This
module does not know models, chunks or who asks; a model without tokenizer works with token ids only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoTokenizer

from chunk_store.key import TokenizerIdentity, digest
from text.chat.parsing.choice import AnswerReader
from text.errors import TextRefused
from text.stream import ByteStream, ByteTable, NoText, TextStream, Vocabulary, WindowStream

# A model directory without any of these has no tokenizer (some loaders would invent an empty one).
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

ROLES_CHECKED_MAX = 64  # roles are the caller's words: what is remembered about them is bounded
LONG_TOKENS = 1024
TEMPLATE_WORDS_MAX = 200
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Shown(Enum):
    """Which special tokens are part of a text."""

    WORDS = "none of them"
    TAGS = "those that tell reasoning and tool calls from text"
    ALL = "all"


class TextCodec:
    """A fast tokenizer, or none: ``TextCodec(None, name)`` refuses text and streams none. Thread-safe."""

    def __init__(self, tokenizer: Any | None, name: str) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._backend: Any | None = None
        self._byte_level = False
        self.answers = AnswerReader(tokenizer)
        self._vocabularies: dict[Shown, Vocabulary] = {}
        self._byte_tables: dict[Shown, ByteTable] = {}
        self.identity: TokenizerIdentity = tokenizer_identity("token ids only")
        self._check_role: Callable[[str], None] = lru_cache(ROLES_CHECKED_MAX)(self._render_together_and_apart)
        if tokenizer is not None:
            self._adopt(tokenizer)

    @classmethod
    def load(cls, path_or_id: str) -> TextCodec:
        """The tokenizer in a model directory or of a hub id; a codec without text where the directory has none.

        Raises ``ValueError`` when there is one and it cannot be loaded or is not a fast tokenizer.
        """
        folder = Path(path_or_id)
        if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return cls(None, path_or_id)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path_or_id)
        except Exception as error:  # of whatever reads its files, config.json among them
            raise ValueError(f"tokenizer of {path_or_id!r} cannot be loaded: {error}") from error
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"tokenizer of {path_or_id!r} is not a fast tokenizer: a tokenizer.json is needed")
        return cls(tokenizer, path_or_id)

    def _adopt(self, tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        serialized = backend.to_str()
        added = backend.get_added_tokens_decoder()
        special = {index: token.content for index, token in sorted(added.items()) if token.special}
        self._backend = backend
        decoder = json.loads(serialized).get("decoder") or {}
        byte_tokens: frozenset[int] = frozenset()
        if '"ByteFallback"' in json.dumps(decoder):
            vocabulary = backend.get_vocab(with_added_tokens=False)
            byte_tokens = frozenset(index for token, index in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))
        self._byte_level = decoder.get("type") == "ByteLevel"
        tags = self.answers.words()
        for shown, skipped in (
            (Shown.WORDS, frozenset(special)),
            (Shown.TAGS, frozenset(index for index, words in special.items() if words not in tags)),
            (Shown.ALL, frozenset[int]()),
        ):
            self._vocabularies[shown] = Vocabulary(backend, skipped, byte_tokens)
            self._byte_tables[shown] = ByteTable(self._vocabularies[shown])
        self.identity = tokenizer_identity(serialized + json.dumps(special, sort_keys=True))

    @property
    def has_text(self) -> bool:
        """Whether text can be encoded and decoded at all."""
        return self._backend is not None

    def for_grammars(self) -> tuple[str, int, frozenset[int]]:
        """The tokenizer as JSON, how many ids it has (the largest + 1), and those that are special.

        Raises ``TextRefused`` without one.
        """
        if self._backend is None:
            raise TextRefused(f"model {self.name!r} has no tokenizer, which a grammar needs")
        added = self._backend.get_added_tokens_decoder()
        size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        return self._backend.to_str(), size, frozenset(index for index, token in added.items() if token.special)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer is not None and bool(self._tokenizer.chat_template)

    def chat_template(self, *, with_tools: bool = False) -> str:
        """The source of the chat template; some models have one of their own for chats with tools.

        Raises ``TextRefused`` where there is none.
        """
        if not self.has_chat_template or self._tokenizer is None:
            raise TextRefused(f"model {self.name!r} has no chat template; send segments instead")
        try:
            return str(self._tokenizer.get_chat_template(tools=[] if with_tools else None))
        except ValueError as error:
            raise TextRefused(str(error)) from None

    @property
    def named_special_tokens(self) -> dict[str, str]:
        """The special tokens that have a name, as templates know them: ``bos_token`` and others."""
        return {} if self._tokenizer is None else dict(self._tokenizer.special_tokens_map)

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """All special tokens, with their words."""
        added = {} if self._backend is None else self._backend.get_added_tokens_decoder()
        return {index: token.content for index, token in added.items() if token.special and token.content}

    def encode(self, text: str, *, role: str = "", generation_prompt: bool = False) -> tuple[int, ...]:
        """Token ids of ``text``: special tokens written in it are parsed, none are added.

        With ``role`` the text is rendered as one turn of the chat template, and with ``generation_prompt`` the
        words that open the model's answer follow. Raises ``TextRefused`` (a ``ValueError``) when there is no
        tokenizer or no chat template, the template refuses the role, or it renders the turn otherwise next to
        other turns than alone.
        """
        if self._backend is None:
            self._refuse_text()
        if role:
            self._check_role(role)
            text = self._render([(role, text)], generation_prompt)
        elif generation_prompt:
            raise TextRefused("generation_prompt: needs a role, it belongs to the chat template")
        # A batch of one: it leaves the interpreter to others while it works, as a plain ``encode`` does not.
        return tuple(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def closing(self, answer: Sequence[int]) -> tuple[int, ...]:
        """What the chat template puts between an answer and the next turn, but for what the answer ends with already.

        An answer that was cut off misses all of it, one that ended by itself perhaps a line break. Empty where there is
        no chat template, or it lets no answer follow a user's turn.
        """
        closing = self._closing
        there = next((n for n in range(len(closing), 0, -1) if tuple(answer[-n:]) == closing[:n]), 0)
        return closing[there:]

    @cached_property
    def _closing(self) -> tuple[int, ...]:
        """What follows the words of an answer, whole."""
        rendered = self._try_render([("user", "Cairn"), ("assistant", "Stone")]) if self.has_chat_template else None
        if rendered is None or "Stone" not in rendered:
            return ()
        return self.encode(rendered.rpartition("Stone")[2])

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of token ids; ids the tokenizer does not know are left out. Raises ``TextRefused`` without one."""
        if self._backend is None:
            self._refuse_text()
        skip = not keep_special
        if len(ids) > LONG_TOKENS:  # leaves the interpreter to others while it works
            return str(self._backend.decode_batch([list(ids)], skip_special_tokens=skip)[0])
        return str(self._backend.decode(list(ids), skip_special_tokens=skip))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in a text, part of a character among them; b"" without a tokenizer."""
        if self._backend is None:
            return b""
        if self._byte_level:
            spelt = self._byte_tables[Shown.ALL][token_id]
            return spelt.encode() if isinstance(spelt, str) else spelt
        return self._vocabularies[Shown.ALL].bytes_of(token_id)

    def stream(self, keep_special: bool = False, *, keep_tags: bool = False) -> TextStream:
        """A fresh stream; without a tokenizer all its text is empty.

        ``keep_tags``: special tokens that ``answers`` looks for are kept.
        """
        shown = Shown.ALL if keep_special else Shown.TAGS if keep_tags else Shown.WORDS
        if self._backend is None:
            return NoText()
        if self._byte_level:
            return ByteStream(self._byte_tables[shown])
        return WindowStream(self._vocabularies[shown])

    def _refuse_text(self) -> NoReturn:
        raise TextRefused(f"text: model {self.name!r} has no tokenizer; give token_ids instead")

    def _render(self, turns: Sequence[tuple[str, str]], generation_prompt: bool = False) -> str:
        if not self.has_chat_template or self._tokenizer is None:
            raise TextRefused(f"role: model {self.name!r} has no chat template; give the text without a role")
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # templates raise what they like, jinja2's errors among it
            roles = ", ".join(role for role, _ in turns)
            # What a template says may quote the text, which is for no log and no error of ours.
            said = str(error)[:TEMPLATE_WORDS_MAX]
            if _quotes(said, turns):
                said = type(error).__name__
            raise TextRefused(f"role: the chat template refuses {roles!r}: {said}") from None
        return text

    def _render_together_and_apart(self, role: str) -> None:
        """Raises ``TextRefused`` unless a turn of ``role`` reads the same alone, before and after another turn."""
        own, twin = (role, "Cairn"), (role, "Stone")
        alone = self._render([own])
        fits: list[bool] = []  # one for each order of turns that the template allows
        if (together := self._try_render([own, twin])) is not None:
            fits.append(together == alone + self._render([twin]))
        for other in ("user", "assistant"):
            if (together := self._try_render([own, (other, "Stone")])) is not None:
                fits.append(together.startswith(alone))
            if (together := self._try_render([(other, "Stone"), own])) is not None:
                fits.append(together.endswith(alone))
        if not fits:
            raise TextRefused(f"role: the chat template allows no other turn next to {role!r}")
        if not all(fits):
            raise TextRefused(
                f"role: the chat template renders a {role!r} turn otherwise next to other turns than alone, so it "
                "cannot be a chunk of its own; render the text yourself and give no role"
            )

    def _try_render(self, turns: Sequence[tuple[str, str]]) -> str | None:
        """None for an order of turns that the template does not allow."""
        try:
            return self._render(turns)
        except TextRefused:
            return None


def tokenizer_identity(serialized: str) -> TokenizerIdentity:
    """The identity that chunk ids are made under, from the tokenizer's own serialized form."""
    return TokenizerIdentity(digest("cairn.tokenizer.v1", [serialized.encode()]))


def _quotes(words: str, turns: Sequence[tuple[str, str]]) -> bool:
    """Whether eight characters in a row come from the turns' texts."""
    runs = {words[at : at + 8] for at in range(max(1, len(words) - 7))}
    return any(run in content for _, content in turns for run in runs)
