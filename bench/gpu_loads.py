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
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from bench.gpu_load_documents import MIB, Documents, show, timed
from bench.gpu_load_stages import stage_both, stage_copies, stage_reads, stage_verify
from chunk_store.format import header as header_module
from chunk_store.key import ChunkId, ModelIdentity
from chunk_store.landing import Landing
from chunk_store.local import blobs as blobs_module
from chunk_store.local import entry_file
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from engine.kv.device_landing import DeviceLanding
from engine.kv.host_tier import HostTier
from engine.kv.source import KVSource
from engine.model.processor import read_processor


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
