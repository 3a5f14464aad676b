"""Several workers on one store: one computation a key, used by all; who computed it leaves no trace."""

from __future__ import annotations

from contextlib import ExitStack

from tests.chunk_store.contract import Place, loads
from tests.chunk_store.processes import child
from tests.chunk_store.workers import compute_each_once, worker_sample

WORKERS = 4
KEYS = 25


def test_workers_compute_each_key_once_and_use_each_others_work(place: Place) -> None:
    store = place.open()
    with ExitStack() as stack:
        workers = [
            stack.enter_context(child(compute_each_once, place.url(), seed, KEYS, ready=False))
            for seed in range(WORKERS)
        ]
        reports = []
        for worker in workers:
            assert worker.reports.poll(60), "a worker did not finish"
            reports.append(worker.reports.recv())
    computed = [number for report in reports for number in report["computed"]]
    assert sorted(computed) == list(range(KEYS)), "each key was computed once, by one of them"
    assert all(report["loaded"] == KEYS for report in reports), "each worker read all, whoever computed it"
    assert all(loads(store, worker_sample(number)) for number in range(KEYS))
    assert store.stats().entries == KEYS
