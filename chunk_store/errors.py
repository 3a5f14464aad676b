"""What goes wrong with a store: one hierarchy, which says what, the remedy, and whether trying again helps.

What is wrong with one entry's data (``Blob...``, ``NoSpace``) stays inside: a store makes a ``MissReason`` of it, or a
``StoreError``.
"""

from __future__ import annotations

from typing import ClassVar


class StoreError(Exception):
    """Base of what a store raises on purpose: ``problem`` names the field or file, ``remedy`` what to do about it.

    ``retry``: the same call may succeed later without anybody doing anything.
    """

    retry: ClassVar[bool] = False

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class StoreUnavailable(StoreError):
    """The backend cannot be reached or written now (disk gone, read-only, server down)."""

    retry = True


class StoreTooNew(StoreError):
    """Newer software wrote the store; it stays as it is. The message says which versions."""


class StoreFull(StoreError):
    """Nothing more can be evicted to make room: capacity is held by pins and leases, or one entry is too big."""


class QuotaFull(StoreFull):
    """A tenant holds what it may hold. The message names the quota, its limit and the remedy."""


class ClaimLost(StoreError):
    """A publication's claim expired and was taken or swept; its data was not published."""

    retry = True


class BlobMissing(Exception):
    """No data under this name."""


class BlobBad(Exception):
    """The data is there and wrong: cut, foreign, another entry's, or a checksum differs. The message says why."""


class BlobOtherVersion(BlobBad):
    """The data is in the format of older or newer software: of no use here, and not damaged."""


class BlobUnreadable(Exception):
    """The data could not be read now (I/O error, server away); it may be fine."""


class NoSpace(Exception):
    """The medium is full."""
