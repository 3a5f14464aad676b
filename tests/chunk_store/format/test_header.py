"""The bytes of an entry: pinned by a golden file, refused when they are anything else."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_store.entry import EntryHeader
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
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.store import Busy, Stored
from tests.chunk_store.contract import Damage, Sample, publish
from tests.chunk_store.places import FilePlace, damage_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "entry-v1.kv"  # in blocks of 256 KiB, as first written
WRITTEN = GOLDEN.with_name("entry-v1-2mib.kv")
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
    assert file_place.file(HEADER.key).read_bytes() == WRITTEN.read_bytes()


@pytest.mark.parametrize(("path", "block_nbytes"), [(GOLDEN, 2**18), (WRITTEN, 2**21)])
def test_the_golden_files_are_read(path: Path, block_nbytes: int, file_place: FilePlace) -> None:
    store = file_place.open()
    publish(store, Sample(HEADER, tuple(golden_parts())))
    file_place.file(HEADER.key).write_bytes(path.read_bytes())
    buffers = [bytearray(len(part)) for part in golden_parts()]
    assert store.load(HEADER.key, HEADER.token_ids, [memoryview(buffer) for buffer in buffers]) is None
    assert [bytes(buffer) for buffer in buffers] == golden_parts()
    raw = path.read_bytes()
    frame = decode_header(raw)
    assert frame.header == HEADER and frame.block_nbytes == block_nbytes
    assert frame.data_offset == 4096
    assert raw[frame.data_offset :] == b"".join(golden_parts())
    assert frame.checksums == tuple(checksum(part) for part in golden_parts())


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


def test_a_context_or_a_token_more_is_counted_before_it_is_encoded() -> None:
    for tokens in (0, 1, 900, 5000):
        header = replace(HEADER, token_ids=tuple(range(tokens)), context=HEADER.context * 20)
        sums = tuple(range(block_count(header.layout.plane_nbytes(tokens), BLOCK_NBYTES)))
        assert len(encode_header(header, sums)) == header_nbytes(header)


def test_hashing_a_block_lets_other_threads_run() -> None:
    """No thread is made to give way here: another one runs only where hashing lets it."""
    turns, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            time.sleep(0)
            turns[0] += 1

    usual, block = sys.getswitchinterval(), memoryview(bytearray(2**27))
    other = threading.Thread(target=count)
    other.start()
    sys.setswitchinterval(1000)
    try:
        before = turns[0]
        checksum(block)
        assert turns[0] > before
    finally:
        sys.setswitchinterval(usual)
        stop.set()
        other.join()
