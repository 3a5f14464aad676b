"""A small store with known content, for the commands that work on a store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkId, ChunkKey, ChunkType, ModelIdentity, TokenizerIdentity, chunk_id, chunk_key
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.open import open_store
from chunk_store.record import ChunkRecord
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored

LAYOUT = KVLayout("bfloat16", (LayerLayout(2, 8, 8),) * 2)  # 128 bytes a token
TOKENIZER = TokenizerIdentity("7" * 64)
MODEL = ModelIdentity("a" * 64)
OTHER_MODEL = ModelIdentity("b" * 64)
TOKENS = 32


def record(number: int, *tags: str, name: str = "") -> ChunkRecord:
    ids = tuple(range(number, number + TOKENS))
    named = chunk_id(TOKENIZER, ChunkType.CONTEXT, ids)
    return ChunkRecord(named, TOKENIZER, ChunkType.CONTEXT, ids, name=name, tags=tags)


def publish(store: SharedStore, of: ChunkRecord, model: ModelIdentity, context: Sequence[ChunkKey] = ()) -> ChunkKey:
    """Stores KV: every byte is the first byte of the key, so that a reader can tell whose it is."""
    key = chunk_key(model, context, of.token_ids)
    header = EntryHeader(key, of.chunk_id, model, LAYOUT, of.token_ids, tuple(context))
    parts = [memoryview(bytearray([int(key[:2], 16)]) * size) for size in LAYOUT.plane_nbytes(TOKENS)]
    publication = store.begin(key)
    assert not isinstance(publication, Stored | Busy)
    with publication:
        publication.write(header, parts)
        publication.commit()
    return key


def fill(url: str) -> list[ChunkId]:
    """Four chunks: ``one`` (tag a), ``two`` (tag a, under ``one``), ``three`` (tag b, two models), a nameless one."""
    records = [record(1, "a", name="one"), record(2, "a", name="two"), record(3, "b", name="three"), record(4)]
    with closing(open_store(url)) as store:
        store.put_records(records)
        first = publish(store, records[0], MODEL)
        publish(store, records[1], MODEL, [first])
        publish(store, records[2], MODEL)
        publish(store, records[2], OTHER_MODEL)
    return [each.chunk_id for each in records]
