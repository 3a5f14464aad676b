"""The embedded store beside memcpy and plain files, and what its calls cost among many entries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from bench.store_entries import Row, compare, entry, parts, put, put_step, take_turns, tokens_of
from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkKey
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore

SIZES_MB = (2, 16, 64)
WORKING_SET_MB = 256
KEPT = 4  # puts replace the oldest of so many, on both sides
COUNTS = (100, 1_000, 10_000, 100_000)
SMALL = KVLayout("float32", (LayerLayout(1, 8, 8),))


def bench_memcpy(seconds: float) -> list[Row]:
    rows = []
    for mb in SIZES_MB:
        header = entry(tokens_of(mb))
        source, target = parts(header), parts(header)

        def copy(source: list[memoryview] = source, target: list[memoryview] = target) -> None:
            for there, here in zip(target, source, strict=True):
                there[:] = here

        (taken,) = take_turns(seconds / 4, [copy])
        rate = header.nbytes / taken / 1e9
        rows.append(Row("memcpy", header.nbytes / 1e6, rate, rate, "itself"))
    return rows


@dataclass(frozen=True)
class StoredFile:
    """An entry in the embedded store, where its data is, and a buffer of its own to read into."""

    header: EntryHeader
    path: Path
    offset: int
    target: list[memoryview]


def stored_file(root: Path, store: SharedStore, header: EntryHeader) -> StoredFile:
    put(store, header, parts(header))
    located = store.ledger.entries.locate(header.key)
    assert located is not None
    path = root / "store" / "data" / header.key[:2] / located.blob
    return StoredFile(header, path, located.stored_nbytes - header.nbytes, parts(header))


def bench_file(root: Path, seconds: float) -> list[Row]:
    store = open_store(f"file://{root}/store", capacity_nbytes=1_000_000_000)
    rows = []
    for mb in SIZES_MB:
        stored = [stored_file(root, store, entry(tokens_of(mb))) for _ in range(max(4, round(WORKING_SET_MB / mb)))]
        header, source = stored[0].header, parts(stored[0].header)
        mine, bare = cycle(stored), islice(cycle(stored), len(stored) // 2, None)

        def read(mine: Iterator[StoredFile] = mine) -> None:
            one = next(mine)
            assert store.load(one.header.key, one.header.token_ids, one.target) is None

        def bare_read(bare: Iterator[StoredFile] = bare) -> None:
            one = next(bare)
            fd = os.open(one.path, os.O_RDONLY)
            os.preadv(fd, one.target, one.offset)
            os.close(fd)

        ring = cycle(range(KEPT))

        def bare_write(source: list[memoryview] = source, ring: Iterator[int] = ring) -> None:
            path = root / f"bare{next(ring)}"
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            os.pwritev(fd, source, 0)
            os.close(fd)

        rows.append(compare("file get", "preadv", header, seconds, read, bare_read))
        kept = open_store(f"file://{root}/puts{mb}", capacity_nbytes=KEPT * (header.nbytes + 8192))
        rows.append(compare("file put", "pwritev", header, seconds, put_step(kept, source, tokens_of(mb)), bare_write))
    store.close()
    return rows


def bench_scale(root: Path) -> list[dict[str, float]]:
    """Costs of one call by the number of entries. Entries are metadata only, but for the ones that are read."""
    rows = []
    store = open_store(f"file://{root}/many", capacity_nbytes=2**40)
    keys: list[ChunkKey] = []
    for wanted in COUNTS:
        while len(keys) < wanted:
            header = entry(1, SMALL)
            store.ledger.entries.adopt(header, f"{header.key}.bench", header.nbytes)
            keys.append(header.key)
        real = entry(1, SMALL)
        data = parts(real)
        put(store, real, data)
        sample = keys[:: max(1, len(keys) // 1000)][:1000]
        sample = (sample * (1000 // len(sample) + 1))[:1000]
        lookup, load, publish, lease = take_turns(
            1.0,
            [
                partial(store.lookup, sample),
                partial(store.load, real.key, real.token_ids, data),
                lambda data=data: put(store, entry(1, SMALL), data),  # type: ignore[misc]
                lambda real=real: store.lease([real.key]).release(),  # type: ignore[misc]
            ],
        )
        rows.append(
            {
                "entries": wanted,
                "lookup_1000_ms": lookup * 1e3,
                "load_us": load * 1e6,
                "put_us": publish * 1e6,
                "lease_us": lease * 1e6,
            }
        )
    store.close()
    return rows
