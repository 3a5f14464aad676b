"""Which chunks the words of a command line stand for: one rule, whether a service is asked or a store.

A chunk is named by its name, by ``:NAME`` (never taken for an id), by its id or by the first digits of its id.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from cairn.cli.arguments import UsageError, shown
from cairn.client.chunks import ChunkRef
from cairn.client.client import Client

SEE_CHUNKS = "see: cairn chunks list"
_ID = re.compile(r"[0-9a-f]{64}")
_DIGITS = re.compile(r"[0-9a-f]{6,64}")
_WORD_OF_LETTERS = re.compile(r"[a-f]{1,11}")  # "facade" and "decade" are words


class ChunkIds(Protocol):
    """Where chunks are looked up: the ids of those that bear a name or a tag, of all without either."""

    def __call__(self, *, name: str = "", tag: str = "") -> Iterable[str]: ...


def registered(client: Client) -> ChunkIds:
    """The chunks that the prefill service lists."""

    def ids(*, name: str = "", tag: str = "") -> Iterable[str]:
        return (chunk.id for chunk in client.chunks(name=name, tag=tag, page_size=1000))

    return ids


def is_id(word: str) -> bool:
    """Whether a word is a whole id, of a chunk or of a model."""
    return _ID.fullmatch(word.lower()) is not None


def may_be_id(word: str) -> bool:
    """Whether a word is an id or at least its first 6 digits."""
    return _DIGITS.fullmatch(word.lower()) is not None


def looks_like_id(word: str) -> bool:
    """Whether a word that may be text is written like an id or the first digits of one."""
    return may_be_id(word) and _WORD_OF_LETTERS.fullmatch(word.lower()) is None


def find_chunk(client: Client, word: str) -> ChunkRef:
    """The registered chunk that a word stands for. Raises as ``find_id``."""
    return ChunkRef(find_id(word, registered(client)))


def find_id(word: str, ids: ChunkIds) -> str:
    """The id of the chunk that a word stands for; a whole id is not looked up.

    Raises ``UsageError`` unless the word stands for exactly one chunk.
    """
    name = word.removeprefix(":")
    if not name:
        raise UsageError("give a chunk's name, its id, or the first 6 digits of its id")
    if is_id(word):
        return word.lower()
    found = set(ids(name=name))
    return only(word, found, "chunks") if found or not may_be_id(word) else id_of_digits(word, ids)


def id_of_digits(word: str, ids: ChunkIds, remedy: str = SEE_CHUNKS) -> str:
    """The id that begins with the digits of a word, or is the word. Raises ``UsageError``, with ``remedy``."""
    digits = word.lower()
    return digits if is_id(word) else only(word, {each for each in ids() if each.startswith(digits)}, "chunks", remedy)


def choose_ids(words: Sequence[str], tags: Sequence[str], ids: ChunkIds) -> list[str]:
    """The ids of the chunks that words and tags stand for, each once.

    Raises ``UsageError`` as ``find_id``, and for a tag that no chunk bears.
    """
    chosen = [find_id(word, ids) for word in words]
    for tag in tags:
        tagged = list(ids(tag=tag)) if tag else []  # an empty tag would choose every chunk
        if not tagged:
            raise UsageError(f"--tag: no chunk bears {shown(tag)}; {SEE_CHUNKS}")
        chosen += tagged
    return list(dict.fromkeys(chosen))


def only(word: str, found: Collection[str], what: str, remedy: str = SEE_CHUNKS) -> str:
    """The one thing found. Raises ``UsageError`` if there are none or several."""
    if len(found) != 1:
        raise UsageError(f"{shown(word)} stands for {len(found)} {what}; {remedy}")
    return next(iter(found))
