"""Verify, repair, export, import and choosing by tag: library functions above any backend."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from chunk_store.record import RecordQuery
from chunk_store.store import Busy, Stored
from chunk_store.tools.archive import export, import_
from chunk_store.tools.archive_file import ArchiveError
from chunk_store.tools.selection import each_record
from chunk_store.tools.verify import Problem, repair, verify
from tests.chunk_store.contract import Damage, Place, loads, publish, sample


def test_a_sound_store_has_no_findings(place: Place) -> None:
    store = place.open()
    for number in range(3):
        publish(store, sample(number))
    seen: list[tuple[int, int]] = []
    report = verify(store, lambda done, total: seen.append((done, total)))
    assert report.sound
    assert (report.entries, report.nbytes) == (3, store.stats().nbytes)
    assert seen[-1] == (3, 3)


def test_verify_finds_and_repair_mends(place: Place) -> None:
    store = place.open()
    cut, flipped, missing, good = (sample(number) for number in range(4))
    for entry in (cut, flipped, missing, good):
        store.put_records([entry.record()])
        publish(store, entry)
    place.damage(cut.key, Damage.CUT)
    place.damage(flipped.key, Damage.FLIPPED_DATA)
    place.damage(missing.key, Damage.MISSING)
    before = verify(store)
    assert sorted(finding.problem for finding in before.findings) == [
        Problem.DATA_BAD,
        Problem.DATA_BAD,
        Problem.DATA_MISSING,
    ]
    assert verify(store) == before, "verify changes nothing"
    assert store.stats().entries == 4
    report = repair(store)
    assert (report.dropped, report.adopted, report.removed, report.left) == (3, 0, 0, 0)
    assert verify(store).sound
    assert store.stats().entries == 1
    assert loads(store, good)


def test_data_that_lost_its_entry_is_adopted_or_removed(place: Place) -> None:
    store = place.open()
    whole, damaged = sample(1), sample(2)
    blobs = []
    for entry in (whole, damaged):
        publish(store, entry)
        located = store.ledger.entries.locate(entry.key)
        assert located is not None
        blobs.append(located.blob)
    place.damage(damaged.key, Damage.FLIPPED_DATA)
    for entry, blob in zip((whole, damaged), blobs, strict=True):
        assert store.ledger.entries.forget(entry.key, blob, quarantined=False)
        store.ledger.upkeep.discard([blob])
    found = verify(store).findings
    assert {(finding.problem, finding.blob) for finding in found} == {(Problem.STRAY, blob) for blob in blobs}
    report = repair(store)
    assert (report.adopted, report.removed) == (1, 1)
    assert verify(store).sound
    assert loads(store, whole) and not loads(store, damaged)


def test_verify_leaves_a_writer_alone(place: Place) -> None:
    store = place.open()
    entry = sample(1)
    publication = store.begin(entry.key)
    assert not isinstance(publication, Stored | Busy)
    with publication:
        publication.write(entry.header, entry.views)
        assert verify(place.open()).sound
        assert repair(place.open()).removed == 0
        publication.commit()
    assert loads(store, entry)


# -- archives -------------------------------------------------------------------------------------------


def test_an_export_can_be_imported_elsewhere(place: Place, file_place_2: Place, tmp_path: Path) -> None:
    source = place.open()
    parent = sample(1)
    child, other = sample(2, context=[parent.key]), sample(3)
    for entry, name in ((parent, "parent"), (child, "child"), (other, "other")):
        source.put_records([entry.record(name=name, tags=("t",), pinned=name == "child")])
        publish(source, entry)
    archive = tmp_path / "some.tar"
    exported = export(source, archive, [child.chunk_id, sample(9).chunk_id])
    assert (exported.records, exported.entries) == (2, 2), "what the child was computed under comes along"
    assert exported.missing == (sample(9).chunk_id,)

    target = file_place_2.open()
    target.put_records([parent.record(name="mine")])
    report = import_(target, archive)
    assert (report.records, report.entries, report.known, report.refused) == (1, 2, 1, ())
    assert report.nbytes == exported.nbytes
    assert loads(target, child) and loads(target, parent) and not loads(target, other)
    names = {record.name: record for record in each_record(target, RecordQuery())}
    assert set(names) == {"mine", "child"}, "a record the store knows keeps its name"
    assert names["child"].pinned and names["child"].tags == ("t",)
    again = import_(target, archive)
    assert (again.records, again.entries, again.known) == (0, 0, 4)


def test_an_archive_is_checked_before_it_is_believed(file_place: Place, file_place_2: Place, tmp_path: Path) -> None:
    source, target = file_place.open(), file_place_2.open()
    entry = sample(1)
    source.put_records([entry.record()])
    publish(source, entry)
    archive = tmp_path / "some.tar"
    export(source, archive, [entry.chunk_id])
    raw = archive.read_bytes()
    data = entry.data[0][:16]
    flipped = bytearray(raw)
    flipped[raw.index(data)] ^= 1
    archive.write_bytes(flipped)
    report = import_(target, archive)
    assert (report.records, report.entries, len(report.refused)) == (1, 0, 1)
    assert not loads(target, entry)

    flipped = bytearray(raw)
    flipped[raw.index(b'"token_ids": [1000') + 14] = ord("2")
    archive.write_bytes(flipped)
    target.delete_chunks([entry.chunk_id])
    assert len(import_(target, archive).refused) == 2, "the record, and the entry that nothing vouches for then"
    assert target.get_records([entry.chunk_id]) == [None]

    for cut in (10, 600, len(raw) // 3, raw.index(data) + 100):
        archive.write_bytes(raw[:cut])
        with pytest.raises(ArchiveError):
            import_(target, archive)


def test_an_archive_with_a_foreign_member_is_refused(file_place: Place, tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        link = tarfile.TarInfo("records/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ArchiveError):
        import_(file_place.open(), archive)


def test_chunks_by_tag(place: Place) -> None:
    store = place.open()
    tagged = [sample(number).record(tags=("old",)) for number in range(5)]
    store.put_records([*tagged, sample(9).record(tags=("new",))])
    chosen = [record.chunk_id for record in each_record(store, RecordQuery(tag="old"))]
    assert set(chosen) == {record.chunk_id for record in tagged}
    assert store.delete_chunks(chosen).records == 5
    assert store.stats().records == 1
