"""How often who used what: what the order of a prompt may follow from."""

from __future__ import annotations

import pytest

from chunk_store.errors import StoreUnavailable
from chunk_store.key import ChunkId
from chunk_store.tenant import DEFAULT_TENANT, SHARED_TENANT, tenant_of
from chunk_store.uses import GATHERED_MAX, UseCounts, Uses
from tests.chunk_store.contract import Place, sample

A, B = tenant_of("a"), tenant_of("b")


def test_uses_are_counted_by_tenant_and_seen_by_other_processes(place: Place) -> None:
    """Also of what is shared: each tenant sees its own uses of it."""
    store, one, two = place.open(), sample(1).record(), sample(2).record()
    everybodys = sample(3).record(tenant=SHARED_TENANT)
    store.put_records([one, two, sample(1, salt="a").record(), everybodys])
    names = [one.chunk_id, two.chunk_id, everybodys.chunk_id]
    assert store.uses(names) == [0, 0, 0] and store.uses([]) == []
    store.note_uses(names[:2])
    store.note_uses([*names[:1], names[2]])
    for _ in range(3):
        store.note_uses([names[0], names[2]], A)
    assert store.uses(names) == [2, 1, 1] and store.uses(names, A) == [3, 0, 3] and store.uses(names, B) == [0, 0, 0]
    store.sweep()
    other = place.open()
    assert other.uses(names) == [2, 1, 1] and other.uses(names, A) == [3, 0, 3] and other.uses(names, B) == [0, 0, 0]
    other.note_uses(names[:1], A)
    other.close()
    assert store.uses(names, A) == place.open().uses(names, A) == [4, 0, 3]


def test_uses_go_with_the_record(place: Place) -> None:
    store, record = place.open(), sample(1).record()
    name = record.chunk_id
    store.put_records([record, sample(1, salt="a").record()])
    store.note_uses([name, ChunkId("0" * 64)])
    store.note_uses([name, name], A)
    store.sweep()
    store.delete_chunks([name])
    store.sweep()
    assert store.uses([name]) == [0] and store.uses([name], A) == [2], "another tenant's are its own"
    store.put_records([record])
    assert store.uses([name]) == [0] and place.open().uses([name]) == [0]
    assert store.uses([ChunkId("0" * 64)]) == [0], "what nobody registered is not counted"
    assert store.ledger.upkeep.audit() == []


class Away:
    """A ledger that takes nothing until it is back."""

    def __init__(self) -> None:
        self.back = False
        self.kept: Uses = Uses()

    def add_uses(self, uses: Uses) -> None:
        if not self.back:
            raise StoreUnavailable("away")
        self.kept.update(uses)

    def uses(self, chunk_ids: list[ChunkId], tenant: object) -> list[int]:
        return [0 for _ in chunk_ids]


def test_what_cannot_be_written_now_is_written_later_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, name = Away(), ChunkId("1" * 64)
    counts = UseCounts(ledger)  # type: ignore[arg-type]
    monkeypatch.setattr("chunk_store.uses.DELAY_S_MAX", -1.0)
    counts.note([name], A)
    counts.note([name], A)
    assert counts.of([name], A) == [2] and not ledger.kept
    for number in range(GATHERED_MAX + 10):
        counts.note([ChunkId(str(number))], DEFAULT_TENANT)
    ledger.back = True
    counts.flush()
    assert ledger.kept[A, name] == 2 and len(ledger.kept) <= GATHERED_MAX + 1
    assert counts.of([name], A) == [0], "it is the ledger's now"
