"""The bytes of an entry: pinned by a golden file, refused when they are anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_store.entry import EntryHeader, MissReason
from chunk_store.errors import BlobBad
from chunk_store.format.header import (
    BLOCK_NBYTES,
    block_count,
    checksum,
    decode_header,
    encode_header,
    fields_end,
    header_nbytes,
    split_blocks,
)
from chunk_store.format.values import values_of
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.local.blobs import SHARE_NBYTES_MIN, FileBlobs
from chunk_store.open import open_store
from chunk_store.store import Busy, Stored
from tests.chunk_store.contract import Damage, blank, loads, publish, sample, views_of
from tests.chunk_store.places import FilePlace, damage_bytes

GOLDEN = Path(__file__).parent / "golden" / "entry-v1.kv"
HEADER_END = fields_end(GOLDEN.read_bytes())

HEADER = EntryHeader(
    key=ChunkKey("0123456789abcdef" * 4),
    chunk_id=ChunkId("fedcba9876543210" * 4),
    model=ModelIdentity("golden-model"),
    layout=KVLayout("bfloat16", (LayerLayout(2, 8, 4), LayerLayout(1, 16, 16))),
    token_ids=(0, 7, 2**32 - 1),
    context=(ChunkKey("a" * 64), ChunkKey("b" * 64)),
    salt_digest="pepper",
)


def golden_parts() -> list[bytes]:
    sizes = HEADER.layout.plane_nbytes(3)
    return [bytes((part * 31 + position * 7) % 256 for position in range(size)) for part, size in enumerate(sizes)]


def test_the_golden_file_is_what_this_version_writes(file_place: FilePlace) -> None:
    store = file_place.open()
    publication = store.begin(HEADER.key)
    assert not isinstance(publication, Stored | Busy)
    with publication:
        publication.write(HEADER, [memoryview(part) for part in golden_parts()])
        publication.commit()
    assert file_place.file(HEADER.key).read_bytes() == GOLDEN.read_bytes()


def test_the_golden_file_is_read(tmp_path: Path) -> None:
    raw = GOLDEN.read_bytes()
    frame = decode_header(raw)
    assert frame.header == HEADER
    assert frame.data_offset == 4096
    assert raw[frame.data_offset :] == b"".join(golden_parts())
    assert frame.checksums == tuple(checksum(part) for part in golden_parts())


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


@pytest.mark.parametrize("length", [0, 1, 7, 8, 23, 24, 100, HEADER_END - 1])
def test_a_cut_header_is_refused(length: int) -> None:
    with pytest.raises(BlobBad):
        decode_header(GOLDEN.read_bytes()[:length])


@pytest.mark.parametrize("how", [Damage.FOREIGN, Damage.NEWER_VERSION, Damage.FLIPPED_HEADER])
def test_a_foreign_header_is_refused_with_the_reason(how: Damage) -> None:
    words = {Damage.FOREIGN: "not written", Damage.NEWER_VERSION: "version 2", Damage.FLIPPED_HEADER: "checksum"}
    with pytest.raises(BlobBad, match=words[how]):
        decode_header(damage_bytes(bytearray(GOLDEN.read_bytes()), how))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 700))
def test_rubbish_never_does_more_than_raise(rubbish: bytes, position: int) -> None:
    raw = bytearray(GOLDEN.read_bytes())
    raw[position : position + len(rubbish)] = rubbish
    for candidate in (rubbish, bytes(raw)):
        try:
            decode_header(candidate)
        except BlobBad:
            continue
        assert candidate[:HEADER_END] == GOLDEN.read_bytes()[:HEADER_END], "what decodes is the header it was"


@settings(max_examples=100, deadline=None)
@given(
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    context=st.lists(st.text(max_size=10), max_size=5),
    layers=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), max_size=4),
    words=st.tuples(st.text(max_size=9), st.text(max_size=9), st.text(max_size=9), st.text(max_size=9)),
)
def test_every_header_survives_the_round_trip(
    token_ids: list[int], context: list[str], layers: list[tuple[int, int, int]], words: tuple[str, str, str, str]
) -> None:
    layout = KVLayout("float16", tuple(LayerLayout(*layer) for layer in layers))
    header = EntryHeader(
        ChunkKey(words[0]),
        ChunkId(words[1]),
        ModelIdentity(words[2]),
        layout,
        tuple(token_ids),
        tuple(ChunkKey(key) for key in context),
        words[3],
    )
    sums = tuple(range(block_count(layout.plane_nbytes(len(token_ids)), BLOCK_NBYTES)))
    raw = encode_header(header, sums)
    frame = decode_header(raw)
    assert (frame.header, frame.checksums) == (header, sums)
    assert frame.data_offset == len(raw) == header_nbytes(header)
    assert len(raw) % 4096 == 0


def test_blocks_cover_each_part_without_spanning_two() -> None:
    parts = [memoryview(bytes(size)) for size in (10, 0, 4, 9)]
    assert [block.nbytes for block in split_blocks(parts, 4)] == [4, 4, 2, 4, 4, 4, 1]
    assert block_count([10, 0, 4, 9], 4) == 7


def test_pieces_are_cut_as_documented() -> None:
    mib = 2**20
    parts = [memoryview(bytes(size)) for size in (3 * mib, mib, 3 * mib // 2, 0, 7)]
    cut = [[span.nbytes for span in piece] for piece in values_of(parts)]
    assert cut == [[2 * mib], [mib, mib], [3 * mib // 2, 7]]
    assert list(values_of([])) == []


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


@pytest.mark.parametrize(
    "url", ["", "x", "/tmp/store", "file:", "file://store", "file://host/x", "ftp://x/y", "file:///a?b"]
)
def test_an_unclear_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="store URL"):
        open_store(url)


@pytest.mark.parametrize("options", [{"capacity_nbytes": 0}, {"records_max": -1}])
def test_limits_are_positive(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        open_store(f"file://{tmp_path}/store", **options)
