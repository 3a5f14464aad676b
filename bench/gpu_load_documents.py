"""Documents that are stored and loaded to a card, and how it is timed."""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity, digest
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored
from engine.kv.pages import PageRun
from engine.kv.pool import PagedKVPool
from engine.kv.pool_bytes import as_bytes

LAYOUT = KVLayout("bfloat16", (LayerLayout(8, 128, 128),) * 36)  # Qwen3-8B: 147 456 bytes a token
MIB = 2**20
T = TypeVar("T")


class Documents:
    """Equal documents in a store of files, and the pages that they are loaded to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokens, self.device = options.tokens, torch.device(options.device)
        pages = -(-options.tokens // 16) * options.documents
        self.pool = PagedKVPool(LAYOUT, pages=pages, chunk_pages=pages, device=self.device)
        runs = [self.pool.allocate_run(options.tokens) for _ in range(options.documents)]
        self.runs: list[PageRun] = [run for run in runs if run is not None]
        self.nbytes_each = LAYOUT.nbytes(options.tokens)
        self.nbytes = self.nbytes_each * options.documents
        self.source = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in LAYOUT.plane_nbytes(options.tokens)]
        self._planes = [self.pool.run_planes(run, options.tokens) for run in self.runs]
        self.ids = tuple(range(options.tokens))
        self.keys = [ChunkKey(digest("cairn.bench.loads", [str(i).encode()])) for i in range(options.documents)]

    def header(self, number: int) -> EntryHeader:
        key = self.keys[number]
        return EntryHeader(key, ChunkId(key), ModelIdentity("bench"), LAYOUT, self.ids, ())

    def publish(self, store: SharedStore, number: int) -> None:
        publication = store.begin(self.keys[number])
        assert not isinstance(publication, Busy | Stored)
        with publication:
            publication.write(self.header(number), as_bytes(self.source))
            publication.commit()

    def planes(self, number: int) -> list[Tensor]:
        return self._planes[number]

    def wrong(self) -> int:
        """How many planes differ from the source."""
        source = [plane.to(self.device) for plane in self.source]
        flat = (plane.view(-1).view(torch.uint8) for n in range(len(self.runs)) for plane in self.planes(n))
        return sum(not torch.equal(plane, source[at % len(source)]) for at, plane in enumerate(flat))

    def clear(self) -> None:
        for tensor in (*self.pool.keys, *self.pool.values):
            tensor.zero_()
        self.wait()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def timed(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and least seconds of ``step`` after a first time."""
    step()
    times = []
    for _ in range(repeats):
        at = time.perf_counter()
        step()
        times.append(time.perf_counter() - at)
    return statistics.median(times), min(times)


def shared_out(items: Iterable[T], threads: int, work: Callable[[int, T], None]) -> None:
    """Does ``work`` for all items in threads, which have numbers; whoever is free takes the next item."""
    left = deque(items)

    def run(number: int) -> None:
        while True:
            try:
                item = left.popleft()
            except IndexError:
                return
            work(number, item)

    started = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def show(what: str, nbytes: int, times: tuple[float, float]) -> None:
    median, least = times
    print(f"{what:64} {median * 1e3:8.1f} ms (least {least * 1e3:7.1f}) {nbytes / median / 1e9:7.1f} GB/s", flush=True)
