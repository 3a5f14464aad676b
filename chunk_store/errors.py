"""What goes wrong with a store: one hierarchy, which says what, the remedy, and whether trying again helps."""

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
