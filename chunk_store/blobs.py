"""Where the bytes of entries are kept: the half of a store that holds data and knows no rules.

A blob is one entry, header and data, under a name that is never used twice (key, dot, a random suffix). Which blob
is the committed one, what may be evicted and who is writing is the ledger's business (``ledger.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from chunk_store.entry import EntryHeader
from chunk_store.errors import BlobBad
from chunk_store.format.header import Frame
from chunk_store.key import ChunkKey
from chunk_store.landing import Landing


@dataclass(frozen=True)
class Quarantined:
    """A bad blob that is kept for inspection, its bytes, and since when (Unix seconds)."""

    blob: str
    nbytes: int
    since: float


@dataclass(frozen=True)
class Expected:
    """What a reader knows of an entry before it trusts one byte of it."""

    key: ChunkKey
    token_ids: Sequence[int]

    def check(self, frame: Frame, sizes: Sequence[int]) -> None:
        """Raises ``BlobBad`` where ``frame`` is not the entry that was asked for, or has not planes of ``sizes``."""
        if frame.header.key != self.key:
            raise BlobBad(f"the header's key is {frame.header.key}, asked for {self.key}")
        if frame.header.token_ids != tuple(self.token_ids):
            raise BlobBad("the stored token ids differ from the requested ones")
        if frame.sizes != tuple(sizes):
            raise BlobBad(f"the stored layout has planes of {frame.sizes} bytes, asked for {tuple(sizes)}")


class Blobs(Protocol):
    """Named, write-once byte strings. Thread-safe."""

    @property
    def kind(self) -> str:
        """The backend's name in statistics, for example ``file``."""

    def write(self, blob: str, header: EntryHeader, views: Sequence[memoryview]) -> None:
        """Writes header and data, complete when it returns.

        Raises ``NoSpace`` or ``StoreUnavailable``; what was written by then is for ``remove``.
        """

    def read(self, blob: str, expected: Expected, landing: Landing) -> None:
        """Reads and verifies; nobody is in a piece of ``landing`` any more when it ends.

        Raises ``BlobMissing``, ``BlobBad`` (``BlobOtherVersion`` where that is all) or ``BlobUnreadable``.
        """

    def frame(self, blob: str) -> Frame:
        """The decoded header alone. Raises as ``read`` does."""

    def remove(self, blobs: Sequence[str]) -> list[str]:
        """Deletes and returns those that are gone now, also those that never were. Raises ``StoreUnavailable``."""

    def quarantine(self, blob: str) -> str:
        """Takes a bad blob out of the way, keeping it for inspection where the medium allows. Never raises.

        Returns where it is or was, in words for a log.
        """

    def quarantined(self) -> list[Quarantined]:
        """What is kept of bad blobs; ``remove`` removes those, too."""

    def names(self) -> Iterator[tuple[str, int]]:
        """Every blob with its stored bytes; a snapshot without locks."""

    def close(self) -> None:
        """Frees handles."""
