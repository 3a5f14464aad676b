"""Eight writers and sixteen readers on one store whose capacity is a tenth of what they want to keep in it."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack

import pytest

from chunk_store.format.header import header_nbytes
from chunk_store.shared_store import SharedStore
from chunk_store.tools.verify import verify
from tests.chunk_store.contract import Place
from tests.chunk_store.processes import child
from tests.chunk_store.workers import stress, stress_sample

KEYS = 300
WRITERS = 8
READERS = 16
SIZES = [
    header_nbytes(entry.header) + entry.header.nbytes for entry in (stress_sample(number) for number in range(KEYS))
]


def run_stress(place: Place, seconds: float) -> Counter[str]:
    capacity = sum(SIZES) // 10
    store = place.open(capacity_nbytes=capacity)
    total: Counter[str] = Counter()
    with ExitStack() as stack:
        children = [
            stack.enter_context(child(stress, place.url(), seed, KEYS, seconds, seed < WRITERS, ready=False))
            for seed in range(WRITERS + READERS)
        ]
        end = time.monotonic() + seconds + 60
        waiting = list(children)
        while waiting and time.monotonic() < end:
            assert store.stats().nbytes <= capacity
            assert nbytes_at_one_instant(store) <= capacity + max(SIZES)
            for one in waiting[:]:
                if one.reports.poll(0.02):
                    report = one.reports.recv()
                    assert isinstance(report, Counter), report
                    total.update(report)
                    waiting.remove(one)
        assert not waiting, f"{len(waiting)} processes never ended"
    store.sweep()
    report = verify(store)
    assert report.sound, report.findings
    assert store.stats().leased_entries == 0
    return total


def nbytes_at_one_instant(store: SharedStore) -> int:
    """What is in both of two listings was there between them; one listing alone would count some blobs twice."""
    before, after = dict(store.blobs.names()), dict(store.blobs.names())
    return sum(nbytes for blob, nbytes in before.items() if blob in after)


def check_counts(total: Counter[str]) -> None:
    documented = {
        *("published", "stored", "busy", "full", "lost", "pinned and unpinned", "deleted"),
        *("hit", "miss", "held"),
    }
    assert set(total) <= documented, total
    assert total["published"] > 20 and total["hit"] > 20 and total["miss"] > 20, total
    assert total["lost"] == 0, "claims live 30 s: nobody may lose one here"


@pytest.mark.parametrize("place", ["file", "redis"], indirect=True)
def test_eight_writers_and_sixteen_readers_for_some_seconds(place: Place) -> None:
    check_counts(run_stress(place, seconds=3.0))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "redis"], indirect=True)
def test_eight_writers_and_sixteen_readers_for_a_minute(place: Place) -> None:
    total = run_stress(place, seconds=60.0)
    print(dict(total))
    check_counts(total)
