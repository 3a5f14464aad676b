"""Room in the registry of an index: what passed through makes it, quotas and shares bound it."""

from __future__ import annotations

import pytest

from chunk_store.errors import QuotaFull, StoreFull
from chunk_store.ledger import Ledger
from chunk_store.record import ChunkRecord
from chunk_store.tenant import TenantLimits
from tests.chunk_store.contract import sample
from tests.chunk_store.local.conftest import store


def records(*numbers: int, salt: str = "", transient: bool = False) -> list[ChunkRecord]:
    return [sample(number, salt=salt).record(transient=transient) for number in numbers]


def known(ledger: Ledger, *numbers: int) -> list[int]:
    found = ledger.records.get([sample(number).chunk_id for number in numbers])
    return [number for number, record in zip(numbers, found, strict=True) if record is not None]


def test_a_full_registry_takes_what_it_knows_and_nothing_new(ledger: Ledger) -> None:
    ledger.records.put(records(1, 2, 3))
    assert ledger.records.put(records(2)) == [False]
    with pytest.raises(StoreFull, match=r"the registry is full: 1 chunks too many; .*records_max"):
        ledger.records.put(records(3, 4))
    assert known(ledger, 1, 2, 3, 4) == [1, 2, 3]


def test_what_passed_through_makes_room_unless_it_is_leased_or_given(ledger: Ledger) -> None:
    ledger.records.put(records(1, 2, 3, transient=True))
    store(ledger, sample(1))
    ledger.leases.hold("lease", [sample(1).key], 30.0)
    ledger.records.put([*records(2, transient=True), *records(4)])
    assert known(ledger, 1, 2, 3, 4) == [1, 2, 4]


def test_an_expired_record_makes_room_first(ledger: Ledger) -> None:
    ledger.records.put([*records(1, 2), sample(3).record(expires_at=1.0)])
    ledger.records.put(records(4))
    assert known(ledger, 1, 2, 3, 4) == [1, 2, 4]


def test_one_tenant_does_not_keep_the_others_out(ledger: Ledger) -> None:
    ledger.records.put(records(1, 2, 3, salt="a"))
    assert ledger.records.put(records(1, salt="b")) == [True], "at most a third of three, and at least one"
    with pytest.raises(StoreFull):
        ledger.records.put(records(2, salt="b"))


def test_quotas_of_records_and_pins(ledger: Ledger) -> None:
    limits = TenantLimits(records=1, pinned=0)
    ledger.records.put(records(1, transient=True))
    ledger.records.put(records(2), limits=limits)  # in the place of what passed through
    assert known(ledger, 1, 2) == [2]
    with pytest.raises(QuotaFull, match="quota chunks: the tenant may have 1"):
        ledger.records.put(records(3), limits=limits)
    for pin in (
        lambda: ledger.records.set_pinned([sample(2).chunk_id], True, limits=limits),
        lambda: ledger.records.put([sample(2).record(pinned=True)], limits=limits),
    ):
        with pytest.raises(QuotaFull, match="quota pins: the tenant may have 0"):
            pin()
    assert ledger.records.put(records(2), limits=TenantLimits(records=0)) == [False], "nothing new is no more"
