"""Which chats were answered with kept turns, and what stood in their prompts; in this process, up to a bound.

    chat 1   system  user 1  -> answer 1       remembered: [system] [turn 1 = user 1 + answer 1]
    chat 2   system  user 1  answer 1  user 2  begins like it: named, not rendered

An entry holds the segments behind those of the entry that it goes on from, so a chat's tokens are held once. It holds
tokens, not names alone: a chunk that the store has dropped since is computed anew, of the very tokens that were
generated. A tenant finds what it said itself, and nothing else.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from chunk_store.tenant import Tenant
from decode_service.prompt.chat_prompt import KeptSegment

NBYTES_MAX = 256 << 20
TENANT_NBYTES_MAX = 64 << 20  # about 16 million tokens
ENTRY_NBYTES = 1024
CHAIN_MAX = 1024  # entries that one goes on from


@dataclass(frozen=True)
class KeptChat:
    """The prompt of an answered chat, and the answer.

    ``segments`` follow those of the chat named ``before`` ("": none); the last is the turn, and its last
    ``answer_tokens`` are the answer. ``text_length`` characters of the chat's rendering, with ``text_digest``, stood
    before that.
    """

    before: str
    segments: tuple[KeptSegment, ...]
    turns: int
    answer_tokens: int
    text_length: int
    text_digest: str

    @property
    def nbytes(self) -> int:
        return ENTRY_NBYTES + sum(segment.nbytes for segment in self.segments)


class ChatMemory:
    """Thread-safe. The least lately used goes first, a tenant's own; of all tenants, that of whoever holds most."""

    def __init__(self, nbytes_max: int = NBYTES_MAX, tenant_nbytes_max: int = TENANT_NBYTES_MAX) -> None:
        self._nbytes_max = nbytes_max
        self._tenant_nbytes_max = tenant_nbytes_max
        self._chats: dict[Tenant, OrderedDict[str, KeptChat]] = {}
        self._nbytes: dict[Tenant, int] = {}
        self._lock = threading.Lock()

    def find(self, tenant: Tenant, name: str) -> tuple[KeptChat, tuple[KeptSegment, ...]] | None:
        """A chat with all its segments; None if it, or one that it goes on from, is not known any more."""
        with self._lock:
            chats = self._chats.get(tenant, OrderedDict())
            chain: list[KeptChat] = []
            at = name
            while at and len(chain) < CHAIN_MAX:
                chat = chats.get(at)
                if chat is None:
                    return None
                chain.append(chat)
                chats.move_to_end(at)  # the oldest last: what a chat goes on from outlives it
                at = chat.before
            if not chain or at:
                return None
            return chain[0], tuple(segment for chat in reversed(chain) for segment in chat.segments)

    def remember(self, tenant: Tenant, name: str, chat: KeptChat) -> None:
        """Keeps a chat, unless it is too large, or it goes on from one that is not known any more."""
        with self._lock:
            chats = self._chats.setdefault(tenant, OrderedDict())
            if chat.nbytes <= self._tenant_nbytes_max and (not chat.before or chat.before in chats):
                self._drop(tenant, name)
                chats[name] = chat
                self._nbytes[tenant] = self._nbytes.get(tenant, 0) + chat.nbytes
                if chat.before:
                    chats.move_to_end(chat.before)
            while self._nbytes.get(tenant, 0) > self._tenant_nbytes_max:
                self._drop(tenant, next(iter(chats)))
            while sum(self._nbytes.values()) > self._nbytes_max:
                most = max(self._nbytes, key=lambda each: self._nbytes[each])
                self._drop(most, next(iter(self._chats[most])))
            for empty in [each for each, held in self._chats.items() if not held]:
                del self._chats[empty]
                self._nbytes.pop(empty, None)

    def _drop(self, tenant: Tenant, name: str) -> None:
        chat = self._chats[tenant].pop(name, None)
        if chat is not None:
            self._nbytes[tenant] -= chat.nbytes
