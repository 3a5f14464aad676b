"""How fast the chunk stores are, each beside what it stands on: memcpy, files, the raw Redis and Mooncake clients.

    python -m bench.store [--backends file,redis,mooncake] [--dir DIR] [--seconds N] [--json FILE]

The two sides of a ratio take turns in the same run; each number is a median. File reads go round a working set larger
than the processor's caches, entries and destination buffers both, as a pool would; ours and the bare read stand half a
round apart. Ours verifies every byte, the other side verifies nothing. Nothing here decides what is good enough.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from chunk_store.entry import EntryHeader
from chunk_store.format.values import VALUE_NBYTES
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity, digest
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.mooncake.client import connect, parse_mooncake_url, pinned_config
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored
from engine.model.processor import read_processor
from tests.chunk_store.servers import Mooncake, Server, mooncake, mooncake_url, redis_server, redis_url

LAYOUT = KVLayout("bfloat16", (LayerLayout(8, 128, 128),) * 28)  # Qwen3-0.6B: 114 688 bytes a token
SIZES_MB = (2, 16, 64)
WORKING_SET_MB = 256
KEPT = 4  # puts replace the oldest of so many, on both sides
COUNTS = (100, 1_000, 10_000, 100_000)
SMALL = KVLayout("float32", (LayerLayout(1, 8, 8),))

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


def get_step(store: SharedStore, header: EntryHeader, views: Sequence[memoryview]) -> Callable[[], None]:
    def get() -> None:
        assert store.load(header.key, header.token_ids, views) is None

    return get


def put_step(store: SharedStore, views: Sequence[memoryview], tokens: int) -> Callable[[], None]:
    """Puts a new key each time; the capacity keeps what stays small."""
    return lambda: put(store, entry(tokens), views)


# -- file -----------------------------------------------------------------------------------------------


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


# -- servers --------------------------------------------------------------------------------------------


@contextmanager
def started(server: Server | Mooncake) -> Iterator[None]:
    server.start()
    try:
        yield
    finally:
        server.kill()


def bench_redis(server: Server, seconds: float) -> list[Row]:
    from chunk_store.redis.connection import RedisConnection, parse_redis_url

    store = open_store(redis_url(server, "bench"), capacity_nbytes=400_000_000)
    raw = RedisConnection(parse_redis_url(redis_url(server, "raw"))).client
    rows = []
    for mb in (2, 16):
        header = entry(tokens_of(mb))
        source, target = parts(header), parts(header)
        put(store, header, source)
        values = raw_values(header.nbytes)

        def raw_put(values: list[bytes] = values) -> None:
            with raw.pipeline(transaction=False) as pipeline:
                for number, value in enumerate(values):
                    pipeline.set(f"raw{number}", value)
                pipeline.execute()

        def raw_get(values: list[bytes] = values) -> None:
            with raw.pipeline(transaction=False) as pipeline:
                for number in range(len(values)):
                    pipeline.get(f"raw{number}")
                assert len(pipeline.execute()[0]) == len(values[0])

        raw_put()
        with store.lease([header.key], ttl_s=600):
            rows.append(compare("redis get", "raw client", header, seconds, get_step(store, header, target), raw_get))
        rows.append(
            compare("redis put", "raw client", header, seconds, put_step(store, source, tokens_of(mb)), raw_put)
        )
    store.close()
    return rows


def bench_mooncake(cluster: Mooncake, seconds: float) -> list[Row]:
    url = mooncake_url(cluster, "bench")
    store = open_store(url, capacity_nbytes=200_000_000)
    raw, config = connect(parse_mooncake_url(url), segment_nbytes=0), pinned_config()
    rows = []
    for mb in (2, 16):
        header = entry(tokens_of(mb))
        source, target = parts(header), parts(header)
        put(store, header, source)
        values = raw_values(header.nbytes)

        def raw_put(values: list[bytes] = values) -> None:
            for number, value in enumerate(values):
                raw.remove(f"raw{number}", True)
                assert raw.put(f"raw{number}", value, config) == 0

        def raw_get(values: list[bytes] = values) -> None:
            for number, value in enumerate(values):
                assert len(raw.get(f"raw{number}")) == len(value)

        raw_put()
        with store.lease([header.key], ttl_s=600):
            rows.append(
                compare("mooncake get", "raw client", header, seconds, get_step(store, header, target), raw_get)
            )
        rows.append(
            compare("mooncake put", "raw client", header, seconds, put_step(store, source, tokens_of(mb)), raw_put)
        )
    store.close()
    raw.close()
    return rows


def raw_values(nbytes: int) -> list[bytes]:
    """The same bytes as values of the size the store uses."""
    return [os.urandom(min(VALUE_NBYTES, nbytes - at)) for at in range(0, nbytes, VALUE_NBYTES)]


def show(rows: Sequence[Row]) -> None:
    print(f"{'':14}{'MB':>8}{'ours GB/s':>12}{'beside GB/s':>13}  {'beside':12}{'ratio':>6}")
    for row in rows:
        print(f"{row.what:14}{row.mb:8.1f}{row.ours:12.2f}{row.theirs:13.2f}  {row.beside:12}{row.ratio:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="file,redis,mooncake", help="comma-separated")
    parser.add_argument("--dir", type=Path, help="where the files go (a temporary directory)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    chosen = options.backends.split(",")
    found: dict[str, Any] = {"load_average": os.getloadavg()[0], "processors": os.cpu_count()}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        root = Path(name)
        if "file" in chosen:
            rows += bench_memcpy(options.seconds) + bench_file(root, options.seconds)
            found["scale"] = bench_scale(root)
        if {"redis", "mooncake"} & set(chosen):
            server = redis_server(make(root / "redis"))
            with started(server):
                if "redis" in chosen:
                    rows += bench_redis(server, options.seconds)
                if "mooncake" in chosen:
                    cluster = mooncake(make(root / "mooncake"), server, memory_gib=0.5)
                    with started(cluster):
                        rows += bench_mooncake(cluster, options.seconds)
    found["rows"] = [{**asdict(row), "ratio": row.ratio} for row in rows]
    print(f"{read_processor()}, {found['processors']} of them, load average {found['load_average']:.1f}")
    show(rows)
    for scale in found.get("scale", []):
        print(
            "  ".join(
                f"{label} {value:,.0f}" if value > 99 else f"{label} {value:.2f}" for label, value in scale.items()
            )
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def make(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    main()
