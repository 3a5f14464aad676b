"""How many pages a pool gets."""

from __future__ import annotations

from chunk_store.layout import KVLayout, LayerLayout
from serving.process.loading import pool_pages


def test_pool_pages() -> None:
    layout = KVLayout("float32", (LayerLayout(2, 8, 8),))
    assert pool_pages(layout, 16, 33) == 3
    assert pool_pages(layout, 16, 10**9, nbytes_max=10 * layout.nbytes(16)) == 10
    assert pool_pages(layout, 16, 33, nbytes_max=1) == 1
