"""All records that a query matches, over as many pages as it takes."""

from __future__ import annotations

import pytest

from chunk_store.record import RecordQuery
from chunk_store.tools import selection
from chunk_store.tools.selection import each_record
from tests.chunk_store.contract import sample
from tests.chunk_store.places import FilePlace


def test_every_page_is_read(file_place: FilePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "PAGE_RECORDS", 2)
    store = file_place.open()
    store.put_records([sample(number).record(tags=("odd",) if number % 2 else ()) for number in range(7)])
    store.put_records([sample(1, salt="a").record(tags=("odd",))])
    found = [record.chunk_id for record in each_record(store, RecordQuery(limit=1))]
    assert sorted(found) == sorted(sample(number).chunk_id for number in range(7))
    tagged = each_record(store, RecordQuery(tag="odd", tenants=None))
    assert len(list(tagged)) == 4
