"""What the words of a command line stand for: chunks, files, texts.

A word that looks like a chunk id is one, or the command ends: an id with a typing error in it would otherwise become
part of a prompt without anybody's notice. ``text:WORD`` says that a word is text, whatever it looks like.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cairn.cli.terminal import Terminal
from cairn.client.client import Client
from cairn.client.requests import Segment
from cairn.client.types import ChunkRef, StoredChunk, Text

Parsed = TypeVar("Parsed")

TEXT_PREFIX = "text:"
_CHUNK_ID = re.compile(r"[0-9a-f]{64}")
_ID_PREFIX = re.compile(r"[0-9a-f]{6,64}")
_WORD_OF_LETTERS = re.compile(r"[a-f]{1,11}")  # "facade" and "decade" are words
_PATH = re.compile(r"(~|\.{1,2})?/\S*|\S+/\S*\.[A-Za-z0-9]{1,8}")


class UsageError(Exception):
    """The command line cannot be carried out as it was typed; nothing was sent."""


def looks_like_id(word: str) -> bool:
    """Whether a word is written like a chunk id or the first digits of one."""
    lower = word.lower()
    return _ID_PREFIX.fullmatch(lower) is not None and _WORD_OF_LETTERS.fullmatch(lower) is None


def read_segment(word: str, client: Client, terminal: Terminal, *, role: str = "") -> Segment:
    """One segment of a prompt: ``:NAME``, a chunk id or its first digits, ``@FILE``, ``text:WORDS``, or text.

    Raises ``UsageError`` for a chunk or a file that is not there.
    """
    if word.startswith(":"):
        return find_chunk(client, word)
    if looks_like_id(word):
        return _by_id(client, word, f"; write {TEXT_PREFIX}{word} if it is text")
    if word.startswith("@"):
        return Text(read_file(Path(word[1:])), role=role)
    if word.startswith(TEXT_PREFIX):
        return Text(word.removeprefix(TEXT_PREFIX), role=role)
    if _means_a_file(word, terminal):
        return Text(read_file(Path(word).expanduser()), role=role)
    return Text(word, role=role)


def find_chunk(client: Client, word: str) -> ChunkRef:
    """The chunk that ``:NAME``, a name, an id or the first digits of an id (6 or more) stand for.

    Raises ``UsageError`` unless it stands for exactly one; a whole id is left to the service.
    """
    name = word.removeprefix(":")
    if not name:
        raise UsageError("give a chunk's name, its id, or the first 6 digits of its id")
    may_be_id = not word.startswith(":") and _ID_PREFIX.fullmatch(name.lower()) is not None
    if may_be_id and _CHUNK_ID.fullmatch(name.lower()):
        return ChunkRef(name.lower())
    named = list(client.chunks(name=name))
    if not named and may_be_id:
        return _by_id(client, name)
    return _only(word, named)


def _by_id(client: Client, word: str, remedy: str = "") -> ChunkRef:
    digits = word.lower()
    if _CHUNK_ID.fullmatch(digits):
        return ChunkRef(digits)
    found = [chunk for chunk in client.chunks(page_size=1000) if chunk.id.startswith(digits)]
    return _only(word, found, remedy)


def _only(word: str, found: Sequence[StoredChunk], remedy: str = "") -> ChunkRef:
    ids = {chunk.id for chunk in found}
    if len(ids) != 1:
        raise UsageError(f"{_shown(word)} stands for {len(ids)} chunks{remedy}; see: cairn chunks list")
    return ChunkRef(ids.pop())


def _means_a_file(word: str, terminal: Terminal) -> bool:
    """Whether a word that is written like a path stands for the file's text: asks a person, warns a script."""
    if any(character.isspace() for character in word):
        return False
    try:
        is_file = Path(word).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # longer than any path, no such user, a null character
        return False
    if not is_file:
        if _PATH.fullmatch(word) and "://" not in word:
            terminal.warn(f"{_shown(word)} looks like a path, but no such file exists: it is sent as text")
        return False
    answer = terminal.ask(f"{_shown(word)} is a file. Send its content?")
    if answer is None:
        terminal.warn(f"{_shown(word)} is a file, but is sent as text; write @{word} to send its content")
    return bool(answer)


def read_file(path: Path) -> str:
    """A file's text. Raises ``UsageError``."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def typed(parse: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    """``parse`` as an argparse type that says what its ``ValueError`` says."""

    def of(text: str) -> Parsed:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return of


def _shown(word: str) -> str:
    return repr(word if len(word) <= 80 else f"{word[:77]}...")
