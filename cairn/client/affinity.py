"""What of a request decides where it goes: keys of what it shares with others, and the conversation that it goes on.

A key stands for KV. In reuse mode exact that of a chunk depends on all before it, so there the key is of the prompt up
to and including the chunk, of equals the first; where the service sorts, in the order that it is likely to choose. In
the other modes the key is of the chunk itself, of equals the one that is used least: the others are everywhere anyway.
Keys come in the order of what the chunks cost: their tokens where they are known, else their characters.

Of a chat those pieces count that a conversation always begins with: tools, then messages up to the first question.
Touches no network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from protos import chunks_pb2, decode_pb2

CHARACTERS_A_TOKEN = 4
UNKNOWN_TOKENS = 512  # what a chunk of unknown length is taken for
KEYS_MAX = 32
BEGINNINGS = ("system", "developer", "")  # roles that stand before the first question
_NBYTES = 16


@dataclass(frozen=True)
class Affinity:
    """``keys``: of what may be resident somewhere, the most expensive first. ``parts``: of the chunks alone. ``turns``:
    names of the conversation as it was before this request, the latest first. ``here``: its name with this request
    answered. ``inline``: digests of chunks that were sent in full, by their place."""

    keys: tuple[bytes, ...] = ()
    parts: tuple[bytes, ...] = ()
    turns: tuple[bytes, ...] = ()
    here: tuple[bytes, ...] = ()
    inline: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True)
class Seen:
    """What is known from earlier requests: ``sizes``, tokens of chunks by id; how much one of ``Affinity.parts`` is
    ``used``, coarsely; digests of chunks that were ``sent`` in full, by the id that they turned out to have: named by
    it they go where they went before."""

    sizes: Mapping[str, int]
    used: Callable[[bytes], int] = lambda _: 0
    sent: Mapping[str, bytes] = field(default_factory=dict)


def affinity_of(request: decode_pb2.GenerateRequest, seen: Seen, owner: str = "") -> Affinity:
    """``owner`` (a salt, a token) shares with nobody."""
    if request.cache_use == decode_pb2.CACHE_USE_BYPASS:
        return Affinity()
    start = _digest(b"owner", owner.encode())
    return _of_chat(request.chat, seen.sizes, start) if request.HasField("chat") else _of_segments(request, seen, start)


def turn_name(chunk_id: str, owner: str = "") -> bytes:
    """The name of a conversation whose last turn was kept as this chunk."""
    return _digest(_digest(b"owner", owner.encode()), b"turn", chunk_id.encode())


@dataclass(frozen=True)
class _Part:
    """A chunk of a prompt; ``group`` is what may be sorted with it."""

    key: bytes
    tokens: int
    group: tuple[int, str]


def _of_segments(request: decode_pb2.GenerateRequest, seen: Seen, start: bytes) -> Affinity:
    given = request.segments[:-1]
    digests = [_content(each, seen) for each in given]
    parts = [
        _Part(_digest(start, digest), _tokens(each, seen.sizes), _group(each))
        for each, digest in zip(given, digests, strict=True)
    ]
    if request.order == decode_pb2.CHUNK_ORDER_CANONICAL:
        parts = _sorted(parts, seen)
    if request.reuse_mode in (chunks_pb2.REUSE_MODE_EXACT, chunks_pb2.REUSE_MODE_UNSPECIFIED):
        keys = _prefixes(parts, start)
    else:
        first = parts[0].key if parts and request.reuse_mode == chunks_pb2.REUSE_MODE_ANCHORED else b""
        found = sorted((-part.tokens, seen.used(part.key), part.key) for part in parts)
        keys = [_digest(first, key) for *_, key in found]
    names = [each.chunk_id for each in reversed(given) if each.WhichOneof("content") == "chunk_id"]
    turns = tuple(_digest(start, b"turn", name.encode()) for name in names)
    inline = tuple(
        (place, digests[place]) for place, each in enumerate(given) if each.WhichOneof("content") != "chunk_id"
    )
    return Affinity(tuple(keys[:KEYS_MAX]), tuple(part.key for part in parts), turns, inline=inline)


def _content(segment: decode_pb2.Segment, seen: Seen) -> bytes:
    """A digest of what a segment is, or of its name."""
    known = seen.sent.get(segment.chunk_id) if segment.WhichOneof("content") == "chunk_id" else None
    return known or _digest(segment.SerializeToString(deterministic=True))


def _prefixes(parts: list[_Part], under: bytes) -> list[bytes]:
    """Of each chunk a key with all before it; of the most expensive chunk first, of equals of the first one."""
    found = []
    for place, part in enumerate(parts):
        under = _digest(under, part.key)
        found.append((-part.tokens, place, under))
    return [key for *_, key in sorted(found)]


def _sorted(parts: list[_Part], seen: Seen) -> list[_Part]:
    """About as the service sorts: neighbours of one type, the most used first. It knows more of their use."""
    groups = groupby(parts, lambda part: part.group)
    return [
        part
        for (_, role), group in groups
        for part in (group if role else sorted(group, key=lambda part: (-seen.used(part.key), part.key)))
    ]


def _group(segment: decode_pb2.Segment) -> tuple[int, str]:
    return segment.type, segment.role


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
    return Affinity(keys, turns=tuple(reversed(said[:-1])), here=tuple(said[-1:]))


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
