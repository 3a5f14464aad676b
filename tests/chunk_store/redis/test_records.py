"""Records in Redis: pages by name and by time, over as many steps as it takes."""

from __future__ import annotations

import pytest

from chunk_store.ledger import Ledger
from chunk_store.limits import StoreLimits
from chunk_store.record import RecordOrder, RecordQuery
from chunk_store.redis import records
from chunk_store.tenant import DEFAULT_TENANT, tenant_of
from tests.chunk_store.contract import sample


@pytest.mark.parametrize("order", RecordOrder)
def test_equal_names_and_times_are_passed_in_steps(
    ledger: Ledger, order: RecordOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "STEP_RECORDS", 2)
    ledger.upkeep.set_limits(StoreLimits(records_max=100))
    numbers = range(7)
    ledger.records.put([sample(number).record(name="same", created_at=5.0, last_used_at=6.0) for number in numbers])
    ledger.records.put([sample(1, salt="a").record(name="same", created_at=5.0, last_used_at=6.0)])
    shown, cursor = [], ""
    for _ in range(8):
        query = RecordQuery(order=order, limit=3, cursor=cursor, tenants=[DEFAULT_TENANT, tenant_of("a")])
        page = ledger.records.page(query)
        shown += [(record.chunk_id, record.tenant) for record in page.records]
        cursor = page.next_cursor
        if not cursor:
            break
    wanted = [(sample(number).chunk_id, DEFAULT_TENANT) for number in numbers]
    wanted.append((sample(1).chunk_id, tenant_of("a")))
    assert shown == sorted(wanted), "by chunk id, of one chunk the first tenant first"


def test_registering_again_adds_to_what_is_known(ledger: Ledger) -> None:
    assert ledger.records.put([sample(1).record(name="one", tags=("a",))]) == [True]
    assert ledger.records.put([sample(1).record(tags=("b",), pinned=True)]) == [False] and ledger.records.put([]) == []
    (found,) = ledger.records.get([sample(1).chunk_id])
    assert found is not None and (found.name, found.tags, found.pinned) == ("one", ("a", "b"), True)
    assert ledger.records.page(RecordQuery(tag="b", name="one")).records == (found,)
    assert ledger.records.page(RecordQuery(tag="b", name="two")).records == ()
