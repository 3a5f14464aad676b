"""Uses of chunks on their way to a ledger: gathered, written once a second, never lost to a store that is away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from chunk_store import uses
from chunk_store.errors import StoreUnavailable
from chunk_store.key import ChunkId
from chunk_store.tenant import Tenant
from chunk_store.uses import UseCounts, Uses

A, B = ChunkId("a"), ChunkId("b")
ONE, OTHER = Tenant("one"), Tenant("other")


class Ledger:
    """Keeps what it is given; away while ``away`` is set."""

    def __init__(self) -> None:
        self.kept: Uses = Counter()
        self.writes = 0
        self.away = False

    def add_uses(self, uses: Uses) -> None:
        if self.away:
            raise StoreUnavailable("away")
        self.writes += 1
        self.kept.update(uses)

    def uses(self, chunk_ids: Sequence[ChunkId], tenant: Tenant) -> list[int]:
        return [self.kept[tenant, chunk_id] for chunk_id in chunk_ids]


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(uses, "time", made)
    return made


def test_uses_are_written_together_and_counted_meanwhile(clock: Clock) -> None:
    ledger = Ledger()
    counts = UseCounts(ledger)
    for _ in range(5):
        counts.note([A, B], ONE)
    counts.note([A], OTHER)
    assert ledger.writes == 0 and counts.of([A, B], ONE) == [5, 5] and counts.of([A, B], OTHER) == [1, 0]
    clock.now += uses.DELAY_S_MAX + 0.1
    counts.note([A], ONE)
    assert ledger.writes == 1 and ledger.kept == {(ONE, A): 6, (ONE, B): 5, (OTHER, A): 1}
    assert counts.of([A], ONE) == [6], "nothing is counted twice"


def test_a_store_that_is_away_gets_them_later(clock: Clock) -> None:
    ledger = Ledger()
    counts = UseCounts(ledger)
    ledger.away = True
    counts.note([A], ONE)
    counts.flush()
    assert not ledger.kept and counts.of([A], ONE) == [1]
    ledger.away = False
    counts.flush()
    assert ledger.kept == {(ONE, A): 1}
    counts.flush()
    assert ledger.writes == 1, "nothing to write"


def test_what_is_gathered_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uses, "GATHERED_MAX", 2)
    counts = UseCounts(Ledger())
    counts.note([A, B], ONE)
    counts.note([ChunkId("c")], ONE)
    assert counts.of([A, B, ChunkId("c")], ONE) == [1, 1, 0]
