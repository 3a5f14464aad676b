"""How fast stored documents reach a GPU, by stage and by how it is set up: reading, verifying, copying, all of it.

    python -m bench.gpu_loads [--documents 8] [--tokens 4096] [--dir /dev/shm] [--repeats 5] [--block-mib 2] [--quick]

Documents of random bytes in the 8B shape's layout (604 MB each at 4096 tokens) lie in a store of files. The stages run
alone in the threads that a load has; then whole loads run as the decode service runs them (some at once, each read by
several threads), in one variant after another. Every variant's pages are compared with the source once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch
import xxhash
from torch import Tensor

from chunk_store.entry import EntryHeader
from chunk_store.format import header as header_module
from chunk_store.format.header import checksum
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity, digest
from chunk_store.landing import Landing
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.local import blobs as blobs_module
from chunk_store.local import entry_file
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Stored
from engine.kv.device_landing import DeviceLanding
from engine.kv.host_tier import HostTier
from engine.kv.pages import PageRun
from engine.kv.pool import PagedKVPool
from engine.kv.pool_bytes import as_bytes
from engine.kv.source import KVSource
from engine.model.processor import read_processor

LAYOUT = KVLayout("bfloat16", (LayerLayout(8, 128, 128),) * 36)  # Qwen3-8B: 147 456 bytes a token
MIB = 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """How loads are set up. ``at_once`` loads run side by side, each read by up to ``shares`` threads."""

    at_once: int = 4
    shares: int = 4
    piece_mib: float = 8
    pieces: int = 24
    span_mib: float = 8
    kept: bool = False  # through the host tier, where they stay
    switch_ms: float = 0.2  # how long a thread may keep the interpreter
    without: str = ""  # parts left out, to see what the rest costs: of "read", "verify" and "copy"

    def __str__(self) -> str:
        place = "host tier" if self.kept else f"{self.pieces} x {self.piece_mib:g} MiB"
        threads = f"{self.at_once} x {self.shares} threads"
        left_out = f", without {self.without}" if self.without else ""
        return f"{threads}, {place}, spans {self.span_mib:g}{left_out}"


VARIANTS = (
    Variant(),
    Variant(without="copy"),
    Variant(without="verify"),
    Variant(without="verify and copy"),
    Variant(without="read and verify"),
    Variant(kept=True, without="copy"),
    Variant(shares=3),
    Variant(shares=3, without="copy"),
    Variant(shares=3, pieces=20),
    Variant(shares=3, span_mib=2),
    Variant(span_mib=2),
    Variant(pieces=32),
    Variant(at_once=2, shares=7),
    Variant(at_once=2, shares=6, pieces=20),
    Variant(piece_mib=2, pieces=32),
    Variant(piece_mib=2, pieces=32, shares=3),
    Variant(piece_mib=4, pieces=24),
    Variant(piece_mib=4, pieces=24, shares=3),
    Variant(kept=True),
)


class Anything:
    """Equal to every checksum."""

    def __ne__(self, other: object) -> bool:
        return False


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


# -- stages -----------------------------------------------------------------------------------------------


def pinned(documents: Documents, nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=documents.device.type == "cuda")


def stage_reads(documents: Documents, paths: Sequence[Path], threads: Sequence[int], repeats: int) -> None:
    """Reads all documents, each thread into memory of its own, and verifies or not."""
    files = [os.open(path, os.O_RDONLY) for path in paths]
    start = paths[0].stat().st_size - documents.nbytes_each
    for count in threads:
        for span_mib, block_mib in [(2, 0), (1, 0.25), (2, 2), (8, 2)] if count == max(threads) else [(2, 2)]:
            seconds = _read_all(documents, files, start, count, int(span_mib * MIB), int(block_mib * MIB), repeats)
            what = f"read spans of {span_mib:g} MiB" + (f", verify blocks of {block_mib:g}" if block_mib else "")
            show(f"{what}, {count} threads", documents.nbytes, seconds)
    for fd in files:
        os.close(fd)


def _read_all(
    documents: Documents, files: Sequence[int], start: int, threads: int, span: int, block: int, repeats: int
) -> tuple[float, float]:
    memory = [pinned(documents, span).numpy().data.cast("B") for _ in range(threads)]

    def read(number: int, place: tuple[int, int]) -> None:
        got = os.preadv(place[0], [memory[number]], start + place[1])
        for first in range(0, got if block else 0, block or 1):
            checksum(memory[number][first : min(first + block, got)])

    places = [(fd, at) for fd in files for at in range(0, documents.nbytes_each, span)]
    return timed(lambda: shared_out(places, threads, read), repeats)


def stage_verify(documents: Documents, threads: int, repeats: int) -> None:
    """Hashes the bytes of one document in all threads: with our function, and with one that keeps the others out."""
    memory = pinned(documents, documents.nbytes_each // (4 * MIB) * (4 * MIB)).numpy().data.cast("B")
    ways: list[tuple[str, Callable[[memoryview], int]]] = [("", checksum), (", one call", xxhash.xxh3_64_intdigest)]
    for name, hashed in ways:
        for block_mib in (0.25, 2):
            seconds = _hash_all(memory, int(block_mib * MIB), hashed, threads, repeats)
            show(f"verify blocks of {block_mib:g} MiB{name}, {threads} threads", memory.nbytes, seconds)


def _hash_all(
    memory: memoryview, block: int, hashed: Callable[[memoryview], int], threads: int, repeats: int
) -> tuple[float, float]:
    def work(_: int, at: int) -> None:
        hashed(memory[at : at + block])

    return timed(lambda: shared_out(range(0, memory.nbytes, block), threads, work), repeats)


def stage_copies(documents: Documents, repeats: int) -> None:
    """Copies pinned memory to the pages, in pieces, on streams that take turns."""
    if documents.device.type != "cuda":
        return
    memory = pinned(documents, documents.nbytes_each)
    planes = [plane.view(-1).view(torch.uint8) for n in range(len(documents.runs)) for plane in documents.planes(n)]
    starts = [sum(LAYOUT.plane_nbytes(documents.tokens)[:n]) for n in range(2 * len(LAYOUT.layers))]
    for streams in (1, 4):
        made = [torch.cuda.Stream() for _ in range(streams)]
        for piece_mib in (2, 8):

            def run(piece: int = piece_mib * MIB, made: list[torch.cuda.Stream] = made) -> None:
                number = 0
                for at, plane in enumerate(planes):
                    source = memory[starts[at % len(starts)] :]
                    for first in range(0, plane.nbytes, piece):
                        last = min(first + piece, plane.nbytes)
                        with torch.cuda.stream(made[number % len(made)]):
                            plane[first:last].copy_(source[first:last], non_blocking=True)
                        number += 1
                torch.cuda.synchronize()

            show(f"copy pieces of {piece_mib} MiB, {streams} streams", documents.nbytes, timed(run, repeats))


def stage_both(documents: Documents, paths: Sequence[Path], threads: int, repeats: int) -> None:
    """Reads and verifies while the bus is kept busy with copies of other memory, in a few calls."""
    if documents.device.type != "cuda":
        return
    memory, target = pinned(documents, documents.nbytes_each), torch.empty(documents.nbytes_each, dtype=torch.uint8)
    target, stop, copied = target.to(documents.device), threading.Event(), [0]
    stream = torch.cuda.Stream()

    def copy() -> None:
        while not stop.is_set():
            with torch.cuda.stream(stream):
                target.copy_(memory, non_blocking=True)
            stream.synchronize()
            copied[0] += memory.nbytes

    thread = threading.Thread(target=copy)
    thread.start()
    files = [os.open(path, os.O_RDONLY) for path in paths]
    start = paths[0].stat().st_size - documents.nbytes_each
    for block_mib in (0, 2):
        before, at = copied[0], time.perf_counter()
        seconds = _read_all(documents, files, start, threads - 1, 2 * MIB, block_mib * MIB, repeats)
        rate = (copied[0] - before) / (time.perf_counter() - at) / 1e9
        what = f"read spans of 2 MiB{', verify' if block_mib else ''}, {threads - 1} threads, beside copies"
        show(f"{what} at {rate:.1f} GB/s", documents.nbytes, seconds)
    stop.set()
    thread.join()
    for fd in files:
        os.close(fd)


# -- whole loads ------------------------------------------------------------------------------------------


@contextmanager
def stored(documents: Documents, folder: Path) -> Iterator[tuple[SharedStore, Path]]:
    """A store that has the documents; says how fast it was written."""
    place = Path(tempfile.mkdtemp(dir=folder))
    count = len(documents.keys)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, place)
        store = open_store(f"file://{place}/store", capacity_nbytes=2 * documents.nbytes + count * MIB)
        assert isinstance(store, SharedStore)
        stack.callback(store.close)
        for writers in (1, 8):
            store.delete_chunks([ChunkId(key) for key in documents.keys])
            store.delete_model(ModelIdentity("bench"))
            with ThreadPoolExecutor(writers) as pool:
                at = time.perf_counter()
                list(pool.map(lambda number: documents.publish(store, number), range(count)))
                taken = time.perf_counter() - at
            show(f"write, {writers} at once", documents.nbytes, (taken, taken))
        yield store, place / "store"


def load_all(documents: Documents, store: SharedStore, tier: HostTier, pool: ThreadPoolExecutor) -> list[KVSource]:
    def load(number: int) -> KVSource:
        def read(landing: Landing) -> object:
            return store.land(documents.keys[number], documents.ids, landing)

        source, reason = tier.load(documents.keys[number], documents.planes(number), read)
        assert reason is None, reason
        return source

    return list(pool.map(load, range(len(documents.keys))))


def whole(documents: Documents, store: SharedStore, variant: Variant, repeats: int) -> None:
    kept_nbytes = documents.nbytes + len(documents.keys) * MIB if variant.kept else 0
    pieces, piece_nbytes = variant.pieces, int(variant.piece_mib * MIB)
    with ExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(variant.switch_ms / 1e3)
        stack.enter_context(mock.patch.object(blobs_module, "SHARES_MAX", variant.shares))
        stack.enter_context(mock.patch.object(entry_file, "BATCH_NBYTES", int(variant.span_mib * MIB)))
        loaders = stack.enter_context(ThreadPoolExecutor(variant.at_once))
        if "copy" in variant.without:
            stack.enter_context(mock.patch.object(DeviceLanding, "_launch", lambda *_: None))
        if "verify" in variant.without:
            stack.enter_context(mock.patch.object(entry_file, "checksum", lambda _: Anything()))
        if "read" in variant.without:
            filled = mock.Mock(preadv=lambda fd, views, at: sum(view.nbytes for view in views), pread=os.pread)
            stack.enter_context(mock.patch.object(entry_file, "os", mock.Mock(wraps=os, preadv=filled.preadv)))
        tier = HostTier(kept_nbytes, documents.device, pieces=pieces, piece_nbytes=piece_nbytes)
        documents.clear()

        def from_store() -> None:
            tier._entries.clear()  # nobody loads now
            assert set(load_all(documents, store, tier, loaders)) == {KVSource.STORE}
            documents.wait()

        show(f"  {variant}", documents.nbytes, timed(from_store, repeats))
        wrong = 0 if variant.without else documents.wrong()
        if variant.kept and not variant.without:
            for at_once in (1, 2, 4):
                with ThreadPoolExecutor(at_once) as pool:

                    def from_host(pool: ThreadPoolExecutor = pool) -> None:
                        assert set(load_all(documents, store, tier, pool)) == {KVSource.HOST}
                        documents.wait()

                    documents.clear()
                    show(f"  from the host tier, {at_once} at once", documents.nbytes, timed(from_host, repeats))
                    wrong += documents.wrong()
        if wrong:
            print(f"  WRONG: {wrong} planes differ from the source")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where the stores go, one after another")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--block-mib", type=float, default=2, help="what the store's entries are checked in")
    parser.add_argument("--quick", action="store_true", help="no stages, and the first variants only")
    options = parser.parse_args()
    processors = len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"{read_processor()}, {processors} of them, load average {os.getloadavg()[0]:.1f}; {device}")
    documents = Documents(options)
    print(f"{options.documents} documents of {options.tokens} tokens, {documents.nbytes / 1e9:.2f} GB in all")
    if not options.quick:
        stage_verify(documents, processors, options.repeats)
        stage_copies(documents, options.repeats)
    with (
        mock.patch.object(header_module, "BLOCK_NBYTES", int(options.block_mib * MIB)),
        mock.patch.object(blobs_module, "BLOCK_NBYTES", int(options.block_mib * MIB)),
        stored(documents, options.dir) as (store, place),
    ):
        if not options.quick:
            paths = sorted(path for path in (place / "data").rglob("*") if path.is_file())
            stage_both(documents, paths, processors, options.repeats)
            stage_reads(documents, paths, sorted({max(1, processors // 2), processors}), options.repeats)
        print(f"whole loads, blocks of {options.block_mib:g} MiB:")
        for variant in (VARIANTS[0], VARIANTS[-1]) if options.quick else VARIANTS:
            whole(documents, store, variant, options.repeats)


if __name__ == "__main__":
    main()
