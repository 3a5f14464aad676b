"""What is remembered of content between requests, up to a bound; thread-safe.

Content never changes under its id, so nothing here is ever stale. It is no permission: whether a tenant has a chunk,
the store is asked for every request. A tenant finds only what it has used itself, or what is shared, so that nobody can
tell from how long a request takes what another one's are about.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from chunk_store.key import ChunkId, ChunkKey
from chunk_store.record import ChunkRecord
from chunk_store.tenant import SHARED_TENANT, Tenant

KEYS_MAX = 16384  # about 8 MB

V = TypeVar("V")


class RecordMemory:
    """The records seen last, up to a number of tokens."""

    def __init__(self, tokens_max: int) -> None:
        self._tokens_max = tokens_max
        self._tokens = 0
        self._records: OrderedDict[tuple[Tenant, ChunkId], ChunkRecord] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, tenant: Tenant, name: ChunkId) -> ChunkRecord | None:
        """The tenant's own, else what is shared."""
        with self._lock:
            return self._records.get((tenant, name)) or self._records.get((SHARED_TENANT, name))

    def remember(self, tenant: Tenant, name: ChunkId, record: ChunkRecord | None) -> None:
        """Keeps what a tenant found under a name as the newest; None forgets it, for it is no longer registered."""
        own, everybodys = (tenant, name), (SHARED_TENANT, name)
        with self._lock:
            if record is None or record.tenant == SHARED_TENANT:  # there is none of its own: that would be found first
                self._forget(own)
            if record is None:
                self._forget(everybodys)
            elif len(record.token_ids) <= self._tokens_max:
                place = (record.tenant, name)
                self._forget(place)
                self._records[place] = record
                self._tokens += len(record.token_ids)
            while self._tokens > self._tokens_max:
                self._forget(next(iter(self._records)))

    def _forget(self, place: tuple[Tenant, ChunkId]) -> None:
        known = self._records.pop(place, None)
        self._tokens -= len(known.token_ids) if known else 0


class Newest(Generic[V]):
    """What was worked out last, by what it follows from."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, place: Hashable, make: Callable[[], V]) -> V:
        """What is known, else what ``make`` gives."""
        with self._lock:
            known = self._known.get(place)
            if known is not None:
                self._known.move_to_end(place)
                return known
        made = make()
        with self._lock:
            self._known[place] = made
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        return made


class KeyMemory:
    """Keys of KV, and the largest token id of content: both mean reading all of it."""

    def __init__(self, most: int = KEYS_MAX) -> None:
        self._keys: Newest[ChunkKey] = Newest(most)
        self._largest: Newest[int] = Newest(most)

    def key(self, name: ChunkId, context: Sequence[ChunkKey], salt: str, make: Callable[[], ChunkKey]) -> ChunkKey:
        """The key of content under a context and a salt.

        The last key of a context stands for all of it: it covers the keys before it, and in every mode a chunk's
        context is its last chunk behind that one's own context.
        """
        return self._keys.get((name, context[-1] if context else "", salt), make)

    def largest(self, name: ChunkId, tenant: Tenant, token_ids: Sequence[int]) -> int:
        """The largest token id of content that a tenant uses."""
        return self._largest.get((name, tenant), lambda: max(token_ids))
