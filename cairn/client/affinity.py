"""What of a request decides where it goes: keys of what it shares with others, and the conversation that it goes on.

A key stands for KV. In reuse mode exact that of a chunk depends on all before it, so there the key is of the prompt up
to and including the chunk; in the other modes, and where the service sorts, it is of the chunk itself. Keys come in the
order of what the chunks cost: their tokens where they are known, else their characters.

Of a chat those pieces count that a conversation always begins with: tools, then messages up to the first question.
Touches no network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from protos import chunks_pb2, decode_pb2

CHARACTERS_A_TOKEN = 4
UNKNOWN_TOKENS = 512  # what a chunk of unknown length is taken for
KEYS_MAX = 32
BEGINNINGS = ("system", "developer", "")  # roles that stand before the first question
_NBYTES = 16


@dataclass(frozen=True)
class Affinity:
    """``keys``: of what may be resident somewhere, the most expensive first. ``turns``: names of the conversation as it
    was before this request, the latest first. ``here``: its name with this request answered."""

    keys: tuple[bytes, ...] = ()
    turns: tuple[bytes, ...] = ()
    here: tuple[bytes, ...] = ()


def affinity_of(request: decode_pb2.GenerateRequest, sizes: Mapping[str, int], owner: str = "") -> Affinity:
    """``sizes``: tokens of chunks by id, as far as they are known. ``owner`` (a salt, a token) shares with nobody."""
    if request.cache_use == decode_pb2.CACHE_USE_BYPASS:
        return Affinity()
    start = _digest(b"owner", owner.encode())
    return _of_chat(request.chat, sizes, start) if request.HasField("chat") else _of_segments(request, sizes, start)


def turn_name(chunk_id: str, owner: str = "") -> bytes:
    """The name of a conversation whose last turn was kept as this chunk."""
    return _digest(_digest(b"owner", owner.encode()), b"turn", chunk_id.encode())


def _of_segments(request: decode_pb2.GenerateRequest, sizes: Mapping[str, int], start: bytes) -> Affinity:
    given = request.order != decode_pb2.CHUNK_ORDER_CANONICAL
    exact = given and request.reuse_mode in (chunks_pb2.REUSE_MODE_EXACT, chunks_pb2.REUSE_MODE_UNSPECIFIED)
    first = request.reuse_mode == chunks_pb2.REUSE_MODE_ANCHORED and given
    found: list[tuple[int, int, bytes]] = []
    turns: list[bytes] = []
    under = start
    for place, segment in enumerate(request.segments[:-1]):
        key = _digest(under, segment.SerializeToString(deterministic=True))
        if exact or (first and place == 0):
            under = key
        found.append((-_tokens(segment, sizes), place if exact else 0, key))
        if segment.WhichOneof("content") == "chunk_id":
            turns.append(_digest(start, b"turn", segment.chunk_id.encode()))
    return Affinity(tuple(key for *_, key in sorted(found)[:KEYS_MAX]), tuple(reversed(turns)))


def _of_chat(chat: decode_pb2.Chat, sizes: Mapping[str, int], start: bytes) -> Affinity:
    tools = "".join(chat.tools)
    under = _digest(start, b"chat", tools.encode(), chat.template_arguments.encode())
    found = [(-len(tools) // CHARACTERS_A_TOKEN, 0, under)] if tools else []
    said: list[bytes] = []
    beginning = True
    for place, message in enumerate(chat.messages, 1):
        if beginning:
            found += [(cost, place, key) for cost, key in _of_message(message, sizes, under)]
            beginning = message.role in BEGINNINGS
        under = _digest(under, message.SerializeToString(deterministic=True))
        said.append(under)
    keys = tuple(key for *_, key in sorted(found)[:KEYS_MAX])
    return Affinity(keys, tuple(reversed(said[:-1])), tuple(said[-1:]))


def _of_message(message: decode_pb2.ChatMessage, sizes: Mapping[str, int], under: bytes) -> Iterator[tuple[int, bytes]]:
    """What each part of a message costs, negative, and its key with all before it."""
    under = _digest(under, message.role.encode())
    for part in message.content:
        under = _digest(under, part.SerializeToString(deterministic=True))
        chunk = part.chunk_id or part.chunk_name
        yield -(sizes.get(chunk, UNKNOWN_TOKENS) if chunk else len(part.text) // CHARACTERS_A_TOKEN), under


def _tokens(segment: decode_pb2.Segment, sizes: Mapping[str, int]) -> int:
    content = segment.WhichOneof("content")
    if content == "text":
        return len(segment.text) // CHARACTERS_A_TOKEN
    return len(segment.token_ids.ids) if content == "token_ids" else sizes.get(segment.chunk_id, UNKNOWN_TOKENS)


def _digest(*parts: bytes) -> bytes:
    """Of parts, told apart by their lengths."""
    digest = hashlib.blake2b(digest_size=_NBYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
