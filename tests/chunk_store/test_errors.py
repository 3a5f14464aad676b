"""The hierarchy of errors: all say what went wrong, and whether a retry helps."""

from __future__ import annotations

import pickle

import pytest

from chunk_store.errors import (
    BlobBad,
    BlobOtherVersion,
    ClaimLost,
    QuotaFull,
    StoreError,
    StoreFull,
    StoreTooNew,
    StoreUnavailable,
)
from chunk_store.tools.archive_file import ArchiveError


@pytest.mark.parametrize(
    ("kind", "retry"),
    [(StoreUnavailable, True), (ClaimLost, True), (StoreFull, False), (QuotaFull, False), (StoreTooNew, False)],
)
def test_each_says_whether_a_retry_helps(kind: type[StoreError], retry: bool) -> None:
    assert kind("broken").retry is retry and str(kind("broken")) == "broken"
    assert (kind("broken", "mend it").remedy, str(kind("broken", "mend it"))) == ("mend it", "broken; mend it")
    assert str(pickle.loads(pickle.dumps(kind("broken", "mend it")))) == "broken; mend it"


def test_who_catches_the_wider_error_gets_the_narrower() -> None:
    assert issubclass(QuotaFull, StoreFull) and issubclass(BlobOtherVersion, BlobBad)
    assert issubclass(ArchiveError, StoreError) and not issubclass(BlobBad, StoreError)
