"""The ledger of a directory: SQLite in write-ahead mode."""

from __future__ import annotations

from pathlib import Path

from chunk_store.ledger import Ledger
from chunk_store.limits import StoreLimits
from chunk_store.local.claims import LocalClaims
from chunk_store.local.entries import LocalEntries
from chunk_store.local.index import Index
from chunk_store.local.leases import LocalLeases
from chunk_store.local.records import LocalRecords
from chunk_store.local.upkeep import LocalUpkeep


def local_ledger(path: Path, limits: StoreLimits, synchronous: str = "NORMAL") -> Ledger:
    """The ledger whose index is at ``path``, made where there is none; ``limits`` are set. See ``Index``.

    Raises ``StoreUnavailable``, ``StoreTooNew``.
    """
    index = Index(path, limits, synchronous)
    upkeep = LocalUpkeep(index)
    upkeep.set_limits(limits)
    parts = (LocalRecords(index), LocalEntries(index), LocalClaims(index), LocalLeases(index))
    return Ledger(*parts, upkeep, index.close)
