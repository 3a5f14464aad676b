"""How keys and blobs are named, and that the ledger's sides are what every backend has."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunk_store import ledger
from chunk_store.key import ChunkKey
from chunk_store.ledger import blob_name, check_key, key_of
from chunk_store.limits import StoreLimits
from chunk_store.local.ledger import local_ledger
from tests.chunk_store.contract import sample


def test_a_blob_names_its_key() -> None:
    assert key_of(blob_name(sample(1).key, "nonce")) == sample(1).key


@pytest.mark.parametrize("key", ["", "a" * 63, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="64 lower-case"):
        check_key(ChunkKey(key))
    check_key(sample(1).key)


def test_the_sides_of_a_ledger_are_narrow(tmp_path: Path) -> None:
    opened = local_ledger(tmp_path / "index.sqlite", StoreLimits())
    for side in ("records", "entries", "claims", "leases", "upkeep"):
        protocol = getattr(ledger, side.capitalize())
        promised = {name for name in vars(protocol) if not name.startswith("_")}
        has = {name for name in dir(getattr(opened, side)) if not name.startswith("_")}
        assert promised == has and len(promised) <= 10, side
    opened.close()
