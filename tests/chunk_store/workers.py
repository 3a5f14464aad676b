"""What the child processes of crash and stress tests do. Each opens the store by its URL."""

from __future__ import annotations

import random
import time
from collections import Counter
from multiprocessing.connection import Connection

from chunk_store.entry import MissReason
from chunk_store.errors import ClaimLost, StoreFull, StoreUnavailable
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored
from tests.chunk_store.contract import Sample, blank, sample, views_of

CRASH_TOKENS = 1500


def publish_until_killed(url: str, seed: int, keys: int, reports: Connection) -> None:
    """Publishes entries in random order; sends a number after its commit returned, and only then."""
    chooser = random.Random(seed)
    entries: dict[int, Sample] = {}
    store = open_store(url)
    reports.send_bytes(b"ready")
    while True:
        number = chooser.randrange(keys)
        entry = entries.setdefault(number, sample(number, tokens=CRASH_TOKENS))
        outcome = store.begin(entry.key)
        if isinstance(outcome, Stored):
            store.delete_chunks([entry.chunk_id])
            continue
        if isinstance(outcome, Busy):
            continue
        with outcome:
            outcome.write(entry.header, entry.views)
            outcome.commit()
        reports.send_bytes(str(number).encode())


def publish_once_each(url: str, first: int, reports: Connection) -> None:
    """Publishes new entries one after the other, never deleting; sends each number after its commit returned."""
    store = open_store(url)
    reports.send_bytes(b"ready")
    number = first
    while True:
        entry = sample(number, tokens=CRASH_TOKENS)
        outcome = store.begin(entry.key)
        assert not isinstance(outcome, Stored | Busy)
        with outcome:
            outcome.write(entry.header, entry.views)
            outcome.commit()
        reports.send_bytes(str(number).encode())
        number += 1


def read_until_killed(url: str, seed: int, keys: int, reports: Connection) -> None:
    """Loads and leases at random; sends the word ``wrong`` if bytes that were served are not the entry's."""
    chooser = random.Random(seed)
    store = open_store(url)
    reports.send_bytes(b"ready")
    entries: dict[int, Sample] = {}
    while True:
        number = chooser.randrange(keys)
        entry = entries.setdefault(number, sample(number, tokens=CRASH_TOKENS))
        with store.lease([entry.key], ttl_s=5):
            buffers = blank(entry)
            if store.load(entry.key, entry.header.token_ids, views_of(buffers)) is None:
                right = all(bytes(found) == wanted for found, wanted in zip(buffers, entry.data, strict=True))
                reports.send_bytes(b"right" if right else b"wrong")


def stress(url: str, seed: int, keys: int, seconds: float, writes: bool, reports: Connection) -> None:
    """Random puts, gets, pins, leases and deletions; sends counts, or the error that it must not meet."""
    try:
        reports.send(_stress(open_store(url), random.Random(seed), keys, seconds, writes))
    except Exception as error:
        reports.send(f"{type(error).__name__}: {error}")


def _stress(store: SharedStore, chooser: random.Random, keys: int, seconds: float, writes: bool) -> Counter[str]:
    entries = [stress_sample(number) for number in range(keys)]
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        entry = entries[min(int(chooser.expovariate(4 / keys)), keys - 1)]
        action = chooser.random()
        if writes and action < 0.9:
            counts[_try_publish(store, entry)] += 1
        elif writes and action < 0.95:
            store.put_records([entry.record(pinned=chooser.random() < 0.2)])
            store.set_pinned([entry.chunk_id], False)
            counts["pinned and unpinned"] += 1
        elif writes:
            store.delete_chunks([entry.chunk_id])
            counts["deleted"] += 1
        elif action < 0.1:
            with store.lease([entry.key], ttl_s=5):
                held = store.lookup([entry.key])[0] is not None
                counts[_try_load(store, entry)] += 1
                counts["held"] += held
        else:
            counts[_try_load(store, entry)] += 1
    store.close()
    return counts


def stress_sample(number: int) -> Sample:
    return sample(number, tokens=20 + 7 * (number % 50))


def _try_publish(store: SharedStore, entry: Sample) -> str:
    outcome = store.begin(entry.key)
    if isinstance(outcome, Stored):
        return "stored"
    if isinstance(outcome, Busy):
        return "busy"
    with outcome:
        try:
            outcome.write(entry.header, entry.views)
            outcome.commit()
        except StoreFull:
            return "full"
        except ClaimLost:
            return "lost"
    return "published"


def _try_load(store: SharedStore, entry: Sample) -> str:
    buffers = blank(entry)
    reason = store.load(entry.key, entry.header.token_ids, views_of(buffers))
    if reason is None:
        right = all(bytes(found) == wanted for found, wanted in zip(buffers, entry.data, strict=True))
        return "hit" if right else "TORN"
    if reason in (MissReason.NOT_STORED, MissReason.EVICTED):
        return "miss"
    return f"BAD {reason}"


def answer_until_killed(url: str, reports: Connection) -> None:
    """A small service: publishes and loads the same entry again and again, and says how it went."""
    store = open_store(url)
    number = 0
    while True:
        entry = sample(number % 3)
        number += 1
        try:
            reports.send_bytes(f"{_try_publish(store, entry)} {_try_load(store, entry)}".encode())
        except StoreUnavailable as error:
            reports.send_bytes(f"unavailable {error}".encode())
        time.sleep(0.005)


def worker_sample(number: int) -> Sample:
    return sample(number, tokens=30)


def compute_each_once(url: str, seed: int, keys: int, reports: Connection) -> None:
    """What a prefill worker does with ``keys`` documents, in its own order; sends what it computed and could load."""
    store = open_store(url)
    order = list(range(keys))
    random.Random(seed).shuffle(order)
    computed = []
    for number in order:
        entry = worker_sample(number)
        while True:
            outcome = store.begin(entry.key)
            if isinstance(outcome, Stored):
                break
            if isinstance(outcome, Busy):
                time.sleep(outcome.retry_after_s)
                continue
            with outcome:
                time.sleep(0.005)  # the forward pass
                outcome.write(entry.header, entry.views)
                outcome.commit()
            computed.append(number)
    loaded = 0
    for number in range(keys):
        entry = worker_sample(number)
        buffers = blank(entry)
        loaded += store.load(entry.key, entry.header.token_ids, views_of(buffers)) is None
    reports.send({"computed": computed, "loaded": loaded})
    time.sleep(60)  # the parent ends it
