"""Leases: as long as they hold nobody else has the pages; how each one ends is counted once."""

from __future__ import annotations

import threading
import time
from collections import Counter

from chunk_store.key import ChunkKey
from engine.kv.pages import PageRun
from engine.kv.resident import ResidentChunk
from serving.handover.leases import LeaseEnd, Leases


def chunk(name: str) -> ResidentChunk:
    return ResidentChunk(ChunkKey(name), 4, PageRun(0, 1))


class Kept:
    def __init__(self, lease_s: float = 60.0, leases_max: int = 100) -> None:
        self.ended: Counter[LeaseEnd] = Counter()
        self.said = 0
        self.leases = Leases(
            lease_s, freed=self.freed, ended=lambda how: self.ended.update([how]), leases_max=leases_max
        )

    def freed(self) -> None:
        self.said += 1


def test_a_lease_that_is_given_back_held_until_then_and_only_once() -> None:
    kept, lent = Kept(), chunk("a")
    lease = kept.leases.add("one", lent)
    assert lease and len(kept.leases) == 1
    assert not kept.leases.give_back("two", lease), "another session's"
    assert not kept.leases.give_back("one", lease + 1)
    assert kept.leases.give_back("one", lease) and not kept.leases.give_back("one", lease)
    assert kept.leases.take_freed() == [lent] and kept.leases.take_freed() == []
    assert kept.ended == {LeaseEnd.RETURNED: 1} and kept.said == 1


def test_a_chunk_is_freed_once_for_each_of_its_leases() -> None:
    kept, lent = Kept(), chunk("a")
    numbers = [kept.leases.add("one", lent) for _ in range(3)]
    assert len(set(numbers)) == 3
    kept.leases.end_of("one")
    assert kept.leases.take_freed() == [lent] * 3 and kept.ended == {LeaseEnd.SESSION_ENDED: 3}


def test_leases_run_out_and_it_is_known_when_the_next_one_does() -> None:
    kept = Kept(lease_s=0.05)
    assert kept.leases.expire() == 0.05
    first = kept.leases.add("one", chunk("a"))
    assert 0 < kept.leases.expire() <= 0.05
    while len(kept.leases):
        time.sleep(max(0.0, kept.leases.expire()))
    assert not kept.leases.give_back("one", first) and kept.ended == {LeaseEnd.EXPIRED: 1}


def test_all_are_called_back_whoever_has_them() -> None:
    kept = Kept()
    assert not kept.leases.recall()
    for name in ("one", "two"):
        kept.leases.add(name, chunk(name))
    assert kept.leases.recall() and len(kept.leases.take_freed()) == 2
    assert kept.ended == {LeaseEnd.RECALLED: 2}


def test_there_are_only_so_many() -> None:
    kept = Kept(leases_max=2)
    numbers = [kept.leases.add("one", chunk("a")) for _ in range(3)]
    assert [bool(number) for number in numbers] == [True, True, False]


def test_a_lease_ends_in_one_way_only_whoever_ends_it() -> None:
    kept = Kept()
    numbers = [kept.leases.add("one", chunk(str(n))) for n in range(100)]
    held: list[bool] = []

    def give_back() -> None:
        held.extend(kept.leases.give_back("one", number) for number in numbers)

    threads = [threading.Thread(target=end) for end in (give_back, kept.leases.recall, give_back)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.ended[LeaseEnd.RETURNED] == sum(held) and sum(kept.ended.values()) == 100
    assert len(kept.leases.take_freed()) == 100
