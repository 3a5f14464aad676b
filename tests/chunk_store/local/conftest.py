"""An index of its own for each test, and what its sides need: no blobs, no server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chunk_store.ledger import Ledger
from chunk_store.limits import Space, StoreLimits
from chunk_store.local.index import INDEX, Index
from chunk_store.local.ledger import local_ledger
from tests.chunk_store.contract import Sample

STORED_NBYTES = 4096 + 1120  # of a ``sample`` of five tokens


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path / INDEX, StoreLimits(3 * STORED_NBYTES, 3), "NORMAL")
    yield opened
    opened.close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Room for three entries and three records."""
    opened = local_ledger(tmp_path / INDEX, StoreLimits(3 * STORED_NBYTES, 3))
    yield opened
    opened.close()


def store(ledger: Ledger, *entries: Sample, nonce: str = "one") -> None:
    """Makes entries of nothing: a ledger never touches a blob. What stands in their way is taken for removed."""
    for entry in entries:
        assert ledger.claims.claim(entry.key, nonce, 30.0) is None
        removed: list[str] = []
        while removed := ledger.claims.reserve(entry.key, nonce, Space(STORED_NBYTES, entry.header.tenant), removed):
            pass
        ledger.claims.commit(entry.key, nonce, entry.header)


def stored(ledger: Ledger) -> list[str]:
    """Keys of entries, the next to go first."""
    return [info.key for info in ledger.entries.listed((), None)]
