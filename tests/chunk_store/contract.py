"""What every backend's tests share: a place where a store can be opened again and again, and entries to put in it.

A ``Place`` stands for one store; ``open`` gives one more process's view of it, ``damage`` breaks what it keeps behind
the store's back. The contract tests (``test_contract_*.py``) see nothing else of a backend.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from chunk_store.entry import EntryHeader, EntryInfo
from chunk_store.key import ChunkId, ChunkKey, ChunkType, ModelIdentity, TokenizerIdentity, chunk_id, chunk_key
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.record import ChunkRecord
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored
from chunk_store.tenant import tenant_of

TOKENIZER = TokenizerIdentity("tokenizer-1")
MODEL = ModelIdentity("model-1")
LAYOUT = KVLayout("float32", (LayerLayout(2, 8, 8), LayerLayout(1, 16, 8)))


class Damage(StrEnum):
    FLIPPED_DATA = "flipped data"
    FLIPPED_HEADER = "flipped header"
    CUT = "cut"
    FOREIGN = "foreign"
    OLDER_VERSION = "older version"
    NEWER_VERSION = "newer version"
    MISSING = "missing"


class Place(Protocol):
    """One store, to be opened by several."""

    kind: str

    def open(self, **options: Any) -> SharedStore: ...

    def url(self) -> str: ...

    def damage(self, key: ChunkKey, how: Damage) -> None: ...

    def replace_data(self, key: ChunkKey, other: ChunkKey) -> None:
        """Puts the stored bytes of ``other`` where those of ``key`` are."""


@dataclass(frozen=True)
class Sample:
    """One entry with its data, determined by ``token_ids``, ``context`` and the rest."""

    header: EntryHeader
    data: tuple[bytes, ...]

    @property
    def key(self) -> ChunkKey:
        return self.header.key

    @property
    def chunk_id(self) -> ChunkId:
        return self.header.chunk_id

    @property
    def views(self) -> list[memoryview]:
        return [memoryview(part) for part in self.data]

    def record(self, **changes: Any) -> ChunkRecord:
        """The record of this entry's chunk, of the same tenant."""
        return ChunkRecord(
            chunk_id=self.chunk_id,
            tokenizer=TOKENIZER,
            type=ChunkType.CONTEXT,
            token_ids=self.header.token_ids,
            **{"tenant": self.header.tenant, **changes},
        )


def sample(
    number: int,
    tokens: int = 5,
    context: Sequence[ChunkKey] = (),
    model: ModelIdentity = MODEL,
    salt: str = "",
    layout: KVLayout = LAYOUT,
) -> Sample:
    """The entry of chunk ``number``: the same arguments give the same bytes in any process."""
    token_ids = tuple(number * 1000 + position for position in range(tokens))
    key = chunk_key(model, context, token_ids, salt)
    header = EntryHeader(
        key=key,
        chunk_id=chunk_id(TOKENIZER, ChunkType.CONTEXT, token_ids),
        model=model,
        layout=layout,
        token_ids=token_ids,
        context=tuple(context),
        salt_digest=tenant_of(salt),
    )
    noise = random.Random(key)
    return Sample(header, tuple(noise.randbytes(size) for size in layout.plane_nbytes(tokens)))


def publish(store: SharedStore, entry: Sample) -> EntryInfo:
    """Publishes ``entry``, which must be free to claim."""
    publication = store.begin(entry.key)
    assert not isinstance(publication, Stored | Busy), publication
    with publication:
        publication.write(entry.header, entry.views)
        return publication.commit()


def blank(entry: Sample) -> list[bytearray]:
    """Buffers to load ``entry`` into, filled with something that is not its data."""
    return [bytearray(b"\xee" * len(part)) for part in entry.data]


def views_of(buffers: Sequence[bytearray]) -> list[memoryview]:
    return [memoryview(buffer) for buffer in buffers]


def loads(store: SharedStore, entry: Sample) -> bool:
    """True when ``entry`` loads and its bytes are right, False when it is a miss; wrong bytes fail the test."""
    buffers = blank(entry)
    if store.load(entry.key, entry.header.token_ids, views_of(buffers)) is not None:
        return False
    assert tuple(bytes(buffer) for buffer in buffers) == entry.data, "wrong bytes were served"
    return True
