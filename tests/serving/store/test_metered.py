"""Reads and writes at a store's door are metered."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunk_store.entry import EntryHeader, MissReason
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.open import open_store
from tests.serving.store.metered_store import KEY, LAYOUT, NBYTES, TOKENS, Metered, buffers, put


def test_every_outcome_is_there_from_the_start(metered: Metered) -> None:
    for outcome in ("ok", *(reason.value for reason in MissReason)):
        assert metered.value("reads_total", outcome=outcome) == 0
    for outcome in ("ok", "failed"):
        assert metered.value("writes_total", outcome=outcome) == 0
    for name in ("read_bytes_total", "written_bytes_total", "read_seconds_count", "write_seconds_count"):
        assert metered.value(name) == 0


def test_what_is_written_and_read_is_counted(metered: Metered, tmp_path: Path) -> None:
    put(metered.store)
    assert metered.value("writes_total", outcome="ok") == 1
    assert metered.value("written_bytes_total") == NBYTES and metered.value("write_seconds_count") == 1
    target = buffers(0)
    assert metered.store.load(KEY, TOKENS, target) is None and target == buffers(7)
    assert metered.value("reads_total", outcome="ok") == 1 and metered.value("read_bytes_total") == NBYTES
    (path,) = (path for path in tmp_path.glob("data/**/*") if path.is_file())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert metered.store.load(KEY, TOKENS, target) is MissReason.VERIFY_FAILED
    assert metered.value("reads_total", outcome="verify_failed") == 1
    assert metered.value("read_bytes_total") == NBYTES and metered.value("read_seconds_count") == 2
    assert (tmp_path / "quarantine" / path.name).exists()


def test_a_write_that_fails_is_counted(metered: Metered) -> None:
    other = EntryHeader(ChunkKey("ef" * 32), ChunkId("cd" * 32), ModelIdentity("m"), LAYOUT, TOKENS, ())
    with metered.store.begin(KEY) as publication, pytest.raises(ValueError, match="key"):  # type: ignore[union-attr]
        publication.write(other, buffers(7))
    assert metered.value("writes_total", outcome="failed") == 1
    put(metered.store)  # the claim was given back
    assert metered.value("writes_total", outcome="ok") == 1


def test_a_store_has_one_name_for_all_its_processes(tmp_path: Path) -> None:
    urls = [f"file://{tmp_path / 'one'}", f"file://{tmp_path / 'two'}"]
    (tmp_path / "link").symlink_to(tmp_path / "one")
    urls.append(f"file://{tmp_path / 'link'}")
    names = []
    for url in urls:
        store = open_store(url)
        names.append(store.identity())
        assert store.identity() == names[-1] and store.ledger.upkeep.audit() == []
        store.close()
    assert names[0] == names[2] != names[1]
