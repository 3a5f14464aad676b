"""How fast computed chunks reach a memory-file store, beside bare writes of the same bytes into the same file system.

    python -m bench.publication [--device cuda] [--chunks N] [--tokens N] [--threads 1,2,8] [--dir DIR] [--json FILE]

Chunks of the 8B shape (36 layers, 8 KV heads of 128, bfloat16: 302 MB of 2048 tokens) stand in a pool and are handed to
the publisher one after another, as a device thread that computes in no time would. Rates are GB/s (10^9 bytes) from the
first hand-over to the last commit, medians of ``--repeats``. ``raw`` is ``pwritev`` of the planes where they are (on
the CPU) or of host memory (beside a device), by as many threads, a file each, without headers, checksums or an index.
``copy`` is a device's copies into pinned memory alone. ``submit`` is what a hand-over costs the device thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from prometheus_client import CollectorRegistry

from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.open import open_store
from chunk_store.store import Busy, Stored
from engine.kv.pool import PagedKVPool
from engine.kv.pool_bytes import as_bytes, outgoing
from engine.kv.resident import ResidentChunk, ResidentChunks
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.publisher import Publisher
from serving.publishing.staging import Staging

LAYOUT = KVLayout("bfloat16", (LayerLayout(8, 128, 128),) * 36)
BATCH_NBYTES = 2**20
WAIT_S = 600.0


@dataclass(frozen=True)
class Row:
    """One number of threads; rates in GB/s, ``submit_ms`` the longest hand-over."""

    threads: int
    published: float
    raw: float
    submit_ms: float

    @property
    def ratio(self) -> float:
        return self.published / self.raw


class Filled:
    """A pool full of chunks whose bytes are random."""

    def __init__(self, device: str, chunks: int, tokens: int) -> None:
        pages = chunks * -(-tokens // 16)
        self.pool = PagedKVPool(LAYOUT, pages=pages, chunk_pages=pages, page_size=16, device=device)
        self.residents = ResidentChunks(self.pool)
        self.tokens = tokens
        for tensor in (*self.pool.keys, *self.pool.values):
            tensor.view(torch.int16).random_(-(2**15), 2**15)
        self.chunks: list[ResidentChunk] = []
        for name in range(chunks):
            chunk = self.residents.reserve(ChunkKey(f"{name:064x}"), tokens)
            chunk.ready = True
            self.residents.release(chunk)
            self.chunks.append(chunk)

    @property
    def nbytes(self) -> int:
        return len(self.chunks) * LAYOUT.nbytes(self.tokens)

    def header(self, chunk: ResidentChunk) -> EntryHeader:
        ids = tuple(range(self.tokens))
        return EntryHeader(chunk.key, ChunkId(chunk.key), ModelIdentity("bench"), LAYOUT, ids, ())


def published(filled: Filled, root: Path, threads: int, queue_nbytes: int) -> tuple[float, float]:
    """GB/s of all chunks through a publisher, and seconds of the longest hand-over."""
    store = open_store(f"file://{root}", capacity_nbytes=4 * filled.nbytes)
    device = ThreadPoolExecutor(1)
    metrics = PublicationMetrics(CollectorRegistry(), "bench")
    publisher = Publisher(
        filled.residents, store, post=device.submit, nbytes_max=queue_nbytes, threads=threads, metrics=metrics
    )
    publisher.stages.prepared()
    nbytes, longest = LAYOUT.nbytes(filled.tokens), 0.0
    began = time.perf_counter()
    for chunk in filled.chunks:
        place = publisher.reserve(nbytes, time.monotonic() + WAIT_S, lambda: False)
        claim = store.begin(chunk.key)
        assert not isinstance(claim, Stored | Busy)
        held = publisher.claims.hold(chunk.key, claim)
        header, handed = filled.header(chunk), time.perf_counter()
        device.submit(publisher.submit, place, header, chunk, held).result(WAIT_S)
        longest = max(longest, time.perf_counter() - handed)
    assert publisher.flush(WAIT_S)
    seconds = time.perf_counter() - began
    assert store.stats().entries == len(filled.chunks), "not everything was stored"
    publisher.stop(WAIT_S)
    device.shutdown()
    filled.residents.check_integrity()
    store.close()
    return filled.nbytes / seconds / 1e9, longest


def raw(filled: Filled, root: Path, threads: int, planes: Sequence[Sequence[memoryview]]) -> float:
    """GB/s of bare writes of the same bytes, a file a chunk."""
    root.mkdir()

    def write(number: int) -> None:
        fd = os.open(root / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        at = 0
        for plane in planes[number % len(planes)]:
            for start in range(0, plane.nbytes, BATCH_NBYTES):
                at += os.pwritev(fd, [plane[start : start + BATCH_NBYTES]], at)
        os.close(fd)

    with ThreadPoolExecutor(threads) as writers:
        began = time.perf_counter()
        list(writers.map(write, range(len(filled.chunks))))
        return filled.nbytes / (time.perf_counter() - began) / 1e9


def copied(filled: Filled) -> float:
    """GB/s of the copies out of a device alone."""
    staging = Staging(LAYOUT.nbytes(filled.tokens), filled.pool.device)
    staging.prepare()
    began = time.perf_counter()
    for chunk in filled.chunks:
        region = staging.take(LAYOUT.nbytes(filled.tokens), time.monotonic() + WAIT_S)
        staging.copy(filled.pool.run_planes(chunk.run, chunk.tokens), region)
        staging.give_back(region)
    return filled.nbytes / (time.perf_counter() - began) / 1e9


def host_planes(filled: Filled) -> list[list[memoryview]]:
    """What the bare writes write: the pages themselves, or a copy of one chunk's on the host."""
    pool = filled.pool
    if pool.device.type == "cpu":
        return [as_bytes(pool.run_planes(chunk.run, chunk.tokens)) for chunk in filled.chunks]
    return [outgoing(pool, filled.chunks[0].run, filled.tokens)]


def measure(filled: Filled, directory: Path, threads: int, repeats: int, queue_nbytes: int) -> Row:
    """Both sides in turns."""
    ours, theirs, longest = [], [], []
    planes = host_planes(filled)
    for _ in range(repeats):
        for side in ("published", "raw"):
            root = Path(tempfile.mkdtemp(prefix="bench-publication-", dir=directory))
            try:
                if side == "raw":
                    theirs.append(raw(filled, root / "raw", threads, planes))
                else:
                    rate, seconds = published(filled, root / "store", threads, queue_nbytes)
                    ours.append(rate)
                    longest.append(seconds)
            finally:
                shutil.rmtree(root)
    return Row(threads, median(ours), median(theirs), 1000 * median(longest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunks", type=int, help="default: 8 on the CPU, else 48")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", default=str(min(12, len(os.sched_getaffinity(0)))))
    parser.add_argument("--queue", type=int, default=8 * 2**30, help="bytes of the publisher's queue")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chunks = args.chunks or (8 if args.device == "cpu" else 48)
    filled = Filled(args.device, chunks, args.tokens)
    each = LAYOUT.nbytes(args.tokens) / 1e6
    print(f"{chunks} chunks of {args.tokens} tokens, {each:.0f} MB each, {args.device}, {args.dir}", flush=True)
    if filled.pool.device.type == "cuda":
        print(f"copy: {copied(filled):.1f} GB/s", flush=True)
    rows = []
    for threads in map(int, args.threads.split(",")):
        row = measure(filled, args.dir, threads, args.repeats, args.queue)
        rows.append(row)
        print(
            f"{row.threads:2} threads: published {row.published:5.2f} GB/s, raw {row.raw:5.2f} GB/s, "
            f"ratio {row.ratio:.2f}, submit {row.submit_ms:.2f} ms",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps([{**asdict(row), "ratio": row.ratio} for row in rows], indent=1))


if __name__ == "__main__":
    main()
