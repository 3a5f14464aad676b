"""What another process is told of a pool."""

from __future__ import annotations

import pytest

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.exported import NotExportable, export
from engine.kv.pool import PagedKVPool

LAYOUT = KVLayout("bfloat16", (LayerLayout(2, 3, 5), LayerLayout(1, 4, 4)))


def test_a_pool_in_a_memory_file_says_where_its_planes_are() -> None:
    pool = PagedKVPool(LAYOUT, pages=6, chunk_pages=4, page_size=4, share=True)
    exported = export(pool)
    assert KVLayout.from_canonical(exported.layout) == LAYOUT
    assert (exported.slots, exported.card, exported.planes) == (28, "", ())
    assert [place.nbytes for place in exported.file] == LAYOUT.plane_nbytes(28)
    assert pool.shared is not None and exported.file_nbytes == pool.shared.nbytes


def test_memory_of_ones_own_cannot_be_exported() -> None:
    with pytest.raises(NotExportable, match="own"):
        export(PagedKVPool(LAYOUT, pages=6, chunk_pages=4, page_size=4))
