"""How often tenants use chunks, gathered for up to a second before it is written: no request waits for a writer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from chunk_store.errors import StoreError
from chunk_store.key import ChunkId
from chunk_store.tenant import Tenant

DELAY_S_MAX = 1.0
GATHERED_MAX = 16_384  # chunks; while a store takes nothing, what is beyond is not counted

Uses = Counter[tuple[Tenant, ChunkId]]
"""Uses by who used what."""


class KeptUses(Protocol):
    """The side of a ledger that keeps them, with the record that was used: a tenant's own, else what is shared."""

    def add_uses(self, uses: Uses) -> None:
        """Adds to what is kept of chunks that are registered. Does not wait long for other writers."""

    def uses(self, chunk_ids: Sequence[ChunkId], tenant: Tenant) -> list[int]: ...


class UseCounts:
    """The uses of one process, on their way to the ledger. Thread-safe."""

    def __init__(self, kept: KeptUses) -> None:
        self._kept = kept
        self._gathered: Uses = Counter()
        self._since = 0.0
        self._lock = threading.Lock()

    def note(self, chunk_ids: Sequence[ChunkId], tenant: Tenant) -> None:
        """Counts one use of each; a hint, which may be lost with the process or the store."""
        now = time.monotonic()
        with self._lock:
            if not self._gathered:
                self._since = now
            if len(self._gathered) < GATHERED_MAX:
                self._gathered.update((tenant, chunk_id) for chunk_id in chunk_ids)
            due = now - self._since > DELAY_S_MAX
        if due:
            self.flush()

    def of(self, chunk_ids: Sequence[ChunkId], tenant: Tenant) -> list[int]:
        """What is kept, and what this process is about to add."""
        with self._lock:
            gathered = [self._gathered[tenant, chunk_id] for chunk_id in chunk_ids]
        return [kept + more for kept, more in zip(self._kept.uses(chunk_ids, tenant), gathered, strict=True)]

    def flush(self) -> None:
        """Writes them down, unless the store has other things to do: then later."""
        with self._lock:
            uses, self._gathered, self._since = self._gathered, Counter(), time.monotonic()
        try:
            if uses:
                self._kept.add_uses(uses)
        except StoreError:
            with self._lock:
                self._gathered.update(uses if len(self._gathered) < GATHERED_MAX else {})
