"""A metered store in a directory, and one entry to put there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored
from serving.store.metered import MeteredStore, StoreMeter

LAYOUT = KVLayout("float32", (LayerLayout(1, 4, 4),))
TOKENS = (1, 2, 3)
KEY = ChunkKey("ab" * 32)
NBYTES = LAYOUT.nbytes(len(TOKENS))


def buffers(fill: int) -> list[memoryview]:
    return [memoryview(bytearray([fill]) * size) for size in LAYOUT.plane_nbytes(len(TOKENS))]


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

    def value(self, name: str, **labels: Any) -> float | None:
        return self.registry.get_sample_value(f"cairn_store_{name}", {"model_name": "tiny", **labels})
