"""Reads and writes at a store's door are metered; a store tells its own numbers, and does not hang who asks."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, EntryHeader, MissReason, Stored, StoreUnavailable
from serving.process.metrics_endpoint import SECONDS_BUCKETS
from serving.store import gauges as store_gauges
from serving.store.gauges import StoreGauges
from serving.store.metered import MeteredStore, StoreMeter

LAYOUT = KVLayout("float32", (LayerLayout(1, 4, 4),))
TOKENS = (1, 2, 3)
KEY = ChunkKey("ab" * 32)
NBYTES = LAYOUT.nbytes(len(TOKENS))


def buffers(fill: int) -> list[memoryview]:
    return [memoryview(bytearray([fill]) * size) for size in LAYOUT.buffer_nbytes(len(TOKENS))]


def put(store: SharedStore) -> None:
    publication = store.begin(KEY)
    assert not isinstance(publication, Stored | Busy)
    with publication:
        header = EntryHeader(KEY, ChunkId("cd" * 32), ModelIdentity("m"), LAYOUT, TOKENS, ())
        publication.write(header, buffers(7))
        publication.commit()


class Metered:
    """A metered store in a directory, and its samples."""

    def __init__(self, root: Path) -> None:
        self.registry = CollectorRegistry()
        self.store = MeteredStore(open_store(f"file://{root}"), StoreMeter(self.registry, "tiny"))

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"cairn_store_{name}", {"model_name": "tiny", **labels})


@pytest.fixture
def metered(tmp_path: Path) -> Any:
    made = Metered(tmp_path)
    yield made
    made.store.close()


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
        assert store.identity() == names[-1] and store.ledger.audit() == []
        store.close()
    assert names[0] == names[2] != names[1]


def told(registry: CollectorRegistry) -> dict[str, float]:
    return {sample.name: sample.value for family in registry.collect() for sample in family.samples}


def test_a_store_that_is_away_or_hangs_is_down_and_hangs_nobody(
    metered: Metered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_gauges, "ANSWER_S", 0.2)
    metered.registry.register(StoreGauges(metered.store, "tiny"))
    put(metered.store)
    found = told(metered.registry)
    assert found["cairn_store_up"] == 1 and found["cairn_store_entries"] == 1
    assert {"cairn_store_pinned_entries", "cairn_store_leased_entries", "cairn_store_quarantined_total"} <= found.keys()
    release, asked = threading.Event(), []

    def hang() -> Any:
        asked.append(1)
        release.wait(20)
        raise StoreUnavailable("gone")

    monkeypatch.setattr(metered.store, "stats", hang)
    for _ in range(3):
        found = told(metered.registry)
        assert found["cairn_store_up"] == 0 and "cairn_store_entries" not in found
    assert len(asked) == 1, "one question at a time"
    release.set()
    assert told(metered.registry)["cairn_store_up"] == 0


def test_neighbouring_buckets_differ_by_a_quarter() -> None:
    assert SECONDS_BUCKETS[0] == 0.001 and SECONDS_BUCKETS[-1] == 100.0
    assert all(1.2 < high / low < 1.3 for low, high in pairwise(SECONDS_BUCKETS))
