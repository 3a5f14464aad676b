"""Blobs in a directory: what is read is verified, by however many readers, and nothing else is touched."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from chunk_store.blobs import Expected
from chunk_store.entry import MissReason
from chunk_store.errors import BlobBad, BlobMissing
from chunk_store.landing import Buffers
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.local.blobs import SHARE_NBYTES_MIN, Durability, FileBlobs
from chunk_store.store import Busy, Stored
from tests.chunk_store.contract import blank, loads, publish, sample, views_of
from tests.chunk_store.format.test_header import GOLDEN, HEADER, HEADER_END, golden_parts
from tests.chunk_store.places import FilePlace


@pytest.mark.parametrize("durability", Durability)
def test_what_is_written_is_read_listed_kept_aside_and_removed(tmp_path: Path, durability: Durability) -> None:
    entry, target = sample(1), blank(sample(1))
    with closing(FileBlobs(tmp_path, durability)) as blobs:
        assert list(blobs.names()) == [] and blobs.quarantined() == []
        name = f"{entry.key}.one"
        blobs.write(name, entry.header, entry.views)
        frame = blobs.frame(name)
        assert frame.header == entry.header and list(blobs.names()) == [(name, frame.stored_nbytes)]
        blobs.read(name, Expected(entry.key, entry.header.token_ids), Buffers(views_of(target)))
        assert tuple(map(bytes, target)) == entry.data
        with pytest.raises(BlobBad, match="asked for"):
            blobs.read(name, Expected(sample(2).key, entry.header.token_ids), Buffers(views_of(target)))
        assert blobs.quarantine(name) == f"file {tmp_path / 'quarantine' / name}"
        assert [bad.blob for bad in blobs.quarantined()] == [name] and list(blobs.names()) == []
        with pytest.raises(BlobMissing):
            blobs.frame(name)
        assert blobs.remove([name, "never"]) == [name, "never"] and blobs.quarantined() == []


def test_any_flipped_byte_is_a_miss(tmp_path: Path) -> None:
    """All of header and data in turn; only the padding between them says nothing and is not covered."""
    place = FilePlace(tmp_path / "store")
    store = place.open()
    raw = GOLDEN.read_bytes()
    for position in (*range(0, HEADER_END, 7), *range(4096, len(raw), 5), len(raw) - 1):
        entry = sample(1)
        publication = store.begin(HEADER.key)
        assert not isinstance(publication, Stored | Busy), entry
        with publication:
            publication.write(HEADER, [memoryview(part) for part in golden_parts()])
            publication.commit()
        broken = bytearray(raw)
        broken[position] ^= 0x10
        place.file(HEADER.key).write_bytes(broken)
        buffers = [memoryview(bytearray(len(part))) for part in golden_parts()]
        assert store.load(HEADER.key, HEADER.token_ids, buffers) is MissReason.VERIFY_FAILED, position
    assert len(list((place.root / "quarantine").iterdir())) == 64, "the quarantine is bounded"


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_a_large_entry_is_checked_whole_by_however_many_readers(file_place: FilePlace, helpers: int) -> None:
    store = file_place.open()
    assert isinstance(store.blobs, FileBlobs)
    store.blobs._helpers = helpers
    layout = KVLayout("float32", (LayerLayout(8, 128, 64), LayerLayout(8, 128, 64)))
    entry = sample(1, tokens=1500, layout=layout)
    assert entry.header.nbytes > 4 * SHARE_NBYTES_MIN
    for share in range(5):
        publish(store, entry)
        assert loads(store, entry)
        path = file_place.file(entry.key)
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size - 1 - share * entry.header.nbytes // 5)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        reason = store.load(entry.key, entry.header.token_ids, views_of(blank(entry)))
        assert reason is MissReason.VERIFY_FAILED, f"share {share} from the end"


def test_buffers_are_used_as_they_are(file_place: FilePlace) -> None:
    """Read-only and non-contiguous memory is refused before anything is read."""
    store = file_place.open()
    entry = sample(1)
    buffers = blank(entry)
    strided = memoryview(bytearray(2 * len(buffers[0])))[::2]
    with pytest.raises(ValueError, match="contiguous"):
        store.load(entry.key, entry.header.token_ids, [strided, *views_of(buffers)[1:]])
    with pytest.raises(ValueError, match="writable"):
        store.load(entry.key, entry.header.token_ids, [memoryview(bytes(buffers[0])), *views_of(buffers)[1:]])
