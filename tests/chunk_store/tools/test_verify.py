"""What verify finds and repair mends, on a directory; on every backend: test_contract_integrity.py."""

from __future__ import annotations

import pytest

from chunk_store.format import header
from chunk_store.local import blobs
from chunk_store.tools.verify import Problem, repair, verify
from tests.chunk_store.contract import Damage, loads, publish, sample
from tests.chunk_store.places import FilePlace


def test_a_sound_store_has_no_findings_and_all_of_it_was_read(file_place: FilePlace) -> None:
    store = file_place.open()
    told: list[tuple[int, int]] = []
    infos = [publish(store, sample(number)) for number in range(3)]
    report = verify(store, lambda done, total: told.append((done, total)))
    assert report.sound and report.entries == 3 and told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert report.nbytes == store.stats().nbytes > sum(info.nbytes for info in infos)


@pytest.mark.parametrize(
    ("how", "problem", "outcome"),
    [
        (Damage.FLIPPED_DATA, Problem.DATA_BAD, "dropped"),
        (Damage.CUT, Problem.DATA_BAD, "dropped"),
        (Damage.MISSING, Problem.DATA_MISSING, "dropped"),
        (Damage.OLDER_VERSION, Problem.OTHER_VERSION, "kept"),
    ],
)
def test_each_damage_is_named_and_mended(file_place: FilePlace, how: Damage, problem: Problem, outcome: str) -> None:
    store = file_place.open()
    for number in (1, 2):
        publish(store, sample(number))
    file_place.damage(sample(1).key, how)
    assert [finding.problem for finding in verify(store).findings] == [problem]
    report = repair(store)
    counts = {name: getattr(report, name) for name in ("dropped", "adopted", "removed", "left", "kept")}
    assert counts == {name: int(name == outcome) for name in counts}
    assert verify(store).sound is (outcome == "dropped") and loads(store, sample(2))


def test_strays_are_adopted_with_what_they_were_computed_under_first(file_place: FilePlace) -> None:
    store = file_place.open()
    parent = sample(1)
    child = sample(2, context=[parent.key])
    for entry in (parent, child):
        publish(store, entry)
        placed = store.ledger.entries.locate(entry.key)
        assert placed is not None
        store.ledger.entries.forget(entry.key, placed.blob, quarantined=False)
        store.ledger.upkeep.discard([placed.blob])
    report = repair(store)
    assert (report.adopted, report.removed) == (2, 0) and loads(store, child) and verify(store).sound
    store.put_records([parent.record(expires_at=1.0)])
    assert store.sweep().records == 0, "the child still needs its parent's record"


def test_a_stray_in_blocks_of_another_size_is_adopted_as_large_as_it_is(
    file_place: FilePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What older software wrote has longer headers."""
    store, entry = file_place.open(), sample(1, tokens=100)
    with monkeypatch.context() as older:
        for module in (header, blobs):
            older.setattr(module, "BLOCK_NBYTES", 16)
        publish(store, entry)
    placed = store.ledger.entries.locate(entry.key)
    assert placed is not None
    assert placed.stored_nbytes > header.header_nbytes(entry.header) + entry.header.nbytes
    store.ledger.entries.forget(entry.key, placed.blob, quarantined=False)
    store.ledger.upkeep.discard([placed.blob])
    assert repair(store).adopted == 1
    assert store.ledger.entries.locate(entry.key) == placed and verify(store).sound and loads(store, entry)
