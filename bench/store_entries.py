"""Entries for the benchmark of stores, and how one call is timed beside another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median

from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity, digest
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored

LAYOUT = KVLayout("bfloat16", (LayerLayout(8, 128, 128),) * 28)  # Qwen3-0.6B: 114 688 bytes a token
numbers = count()


@dataclass(frozen=True)
class Row:
    """One comparison: rates in GB/s (10^9 bytes), ``ratio`` ours over theirs."""

    what: str
    mb: float
    ours: float
    theirs: float
    beside: str

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def entry(tokens: int, layout: KVLayout = LAYOUT) -> EntryHeader:
    """The header of an entry that nobody has stored yet."""
    number = next(numbers)
    name = digest("bench", [str(number).encode(), str(os.getpid()).encode(), str(time.time_ns()).encode()])
    ids = tuple(range(tokens))
    return EntryHeader(ChunkKey(name), ChunkId(name), ModelIdentity("bench"), layout, ids, ())


def parts(header: EntryHeader) -> list[memoryview]:
    """Data for an entry, as part buffers with random content."""
    sizes = header.layout.plane_nbytes(len(header.token_ids))
    return [memoryview(bytearray(os.urandom(size))) for size in sizes]


def tokens_of(mb: float) -> int:
    return max(1, round(mb * 1e6 / LAYOUT.nbytes(1)))


def take_turns(seconds: float, steps: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each step, the steps alternating for about ``seconds``, at least five rounds."""
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    for step in steps:
        step()  # warm
    while time.perf_counter() < end or len(times[0]) < 5:
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    return [median(taken) for taken in times]


def put(store: SharedStore, header: EntryHeader, views: Sequence[memoryview]) -> None:
    publication = store.begin(header.key)
    assert not isinstance(publication, Stored | Busy)
    with publication:
        publication.write(header, views)
        publication.commit()


def compare(
    what: str, beside: str, header: EntryHeader, seconds: float, ours: Callable[[], None], theirs: Callable[[], None]
) -> Row:
    mine, other = take_turns(seconds, [ours, theirs])
    return Row(what, header.nbytes / 1e6, header.nbytes / mine / 1e9, header.nbytes / other / 1e9, beside)


def put_step(store: SharedStore, views: Sequence[memoryview], tokens: int) -> Callable[[], None]:
    """Puts a new key each time; the capacity keeps what stays small."""
    return lambda: put(store, entry(tokens), views)
