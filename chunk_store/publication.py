"""One entry on its way into a store: claimed, given space, written, committed; or aborted, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from chunk_store.blobs import Blobs
from chunk_store.entry import EntryHeader, EntryInfo
from chunk_store.errors import ClaimLost, NoSpace, StoreError, StoreFull, StoreUnavailable
from chunk_store.format.header import flat_views, header_nbytes
from chunk_store.key import ChunkKey
from chunk_store.ledger import Ledger, blob_name, claim_lost
from chunk_store.limits import Space
from chunk_store.store import Claim
from chunk_store.tenant import NO_LIMITS, TenantLimits

RESERVE_ATTEMPTS_MAX = 64
WRITE_ATTEMPTS_MAX = 8


class SharedPublication:
    """A claim on one key; see ``Publication``."""

    def __init__(
        self,
        ledger: Ledger,
        blobs: Blobs,
        key: ChunkKey,
        nonce: str,
        ttl_s: float,
        on_end: Callable[[SharedPublication], None],
    ) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._key = key
        self._nonce = nonce
        self._ttl_s = ttl_s
        self._on_end = on_end
        self._header: EntryHeader | None = None
        self._ending = False  # said before the ledger knows: who renews beside it must not take that for a loss
        self._ended = False

    @property
    def claim(self) -> Claim | None:
        return None if self._ending else Claim(self._key, self._nonce, self._ttl_s)

    def renew(self) -> None:
        self._check_open()
        (held,) = self._ledger.claims.renew([(self._key, self._nonce)], self._ttl_s)
        if not held and not self._ending:
            raise claim_lost(self._key)

    def write(self, header: EntryHeader, buffers: Sequence[memoryview], *, limits: TenantLimits = NO_LIMITS) -> None:
        self._check_open()
        if self._header is not None:
            raise StoreError("write was already called for this publication", "call it once")
        if header.key != self._key:
            raise ValueError(f"header.key: {header.key} is not the claimed key {self._key}")
        views = flat_views(buffers, header.layout.plane_nbytes(len(header.token_ids)))
        nbytes = header_nbytes(header) + header.nbytes
        blob = blob_name(self._key, self._nonce)
        self._reserve(Space(nbytes, header.tenant, limits.nbytes))
        for _ in range(WRITE_ATTEMPTS_MAX):
            try:
                self._blobs.write(blob, header, views)
                self._header = header
                return
            except NoSpace as error:
                self._make_room(blob, nbytes, error)
        raise StoreFull(
            f"no room for {nbytes} bytes after evicting {WRITE_ATTEMPTS_MAX} times", "see whether the medium is there"
        )

    def commit(self) -> EntryInfo:
        self._check_open()
        if self._header is None:
            raise StoreError("commit needs write first", "call write, then commit")
        self._ending = True
        try:
            info = self._ledger.claims.commit(self._key, self._nonce, self._header)
        except BaseException:
            self._ending = False  # it may be tried again
            raise
        self._end()
        return info

    def abort(self) -> None:
        if self._ended:
            return
        self._end()
        blob = blob_name(self._key, self._nonce)
        if self._ledger.claims.drop(self._key, self._nonce):
            self._ledger.upkeep.discard(self._blobs.remove([blob]))
            return
        placed = self._ledger.entries.locate(self._key)
        if placed is None or placed.blob != blob:  # it is, when a commit was done and its answer got lost
            self._blobs.remove([blob])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.abort()
        except StoreUnavailable:
            if error is None:
                raise  # an error that is already on its way tells more

    def _reserve(self, space: Space) -> None:
        removed: list[str] = []
        for _ in range(RESERVE_ATTEMPTS_MAX):
            garbage = self._ledger.claims.reserve(self._key, self._nonce, space, removed)
            if not garbage:
                return
            removed = self._blobs.remove(garbage)
        raise StoreFull(f"no room for {space.nbytes} bytes: other writers took what was evicted", "try again")

    def _make_room(self, blob: str, nbytes: int, cause: NoSpace) -> None:
        """Evicts as much as is to be written. Raises ``StoreFull`` when there is nothing to evict."""
        self._blobs.remove([blob])
        garbage = self._ledger.claims.evict(nbytes)
        if not garbage:
            raise StoreFull(
                f"the store's medium is full: {cause}", "free space on it, or lower the store's capacity"
            ) from cause
        self._ledger.upkeep.discard(self._blobs.remove(garbage))

    def _check_open(self) -> None:
        if self._ended:
            raise ClaimLost("the publication has ended (committed, aborted, or its store was closed)", "begin again")

    def _end(self) -> None:
        self._ending = self._ended = True
        self._on_end(self)
