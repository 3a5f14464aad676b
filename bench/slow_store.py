"""How long an answer waits before its new document may be computed, where the store takes less than is computed.

    python -m bench.slow_store [--clients 32] [--seconds 30] [--chunk-mib 1] [--disk-mib 4] [--queue 72]

So many clients ask one after the other for documents of their own, as ``bench.families`` does of a model with much KV a
token: each claims its document, computes it (0.2 s) and hands it to the publisher. Writes share ``--disk-mib`` MiB a
second; ``--queue`` documents may wait for them. No model: what is measured is waiting.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkId, ChunkKey, ChunkType, ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.local.blobs import FileBlobs
from chunk_store.open import open_store
from chunk_store.tenant import DEFAULT_TENANT, NO_LIMITS
from decode_service.kv_source.asking import FetchTerms
from decode_service.kv_source.claims import ChunkClaims
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import RequestChunk, Segment
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.reuse import ReuseMode
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.publisher import Publisher

TOKENS, COMPUTE_S, WAIT_S = 64, 0.2, 600.0
POOL_CHUNKS = 256


class SlowDisk:
    """Writes of a store, ``nbytes_s`` bytes a second in all."""

    def __init__(self, blobs: FileBlobs, nbytes_s: float) -> None:
        self._write, self._nbytes_s = blobs.write, nbytes_s
        self._lock = threading.Lock()

    def write(self, blob: str, header: EntryHeader, views: Sequence[memoryview]) -> None:
        with self._lock:
            time.sleep(header.nbytes / self._nbytes_s)
        self._write(blob, header, views)


class Clients:
    """What they ask of one process."""

    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        nbytes = args.chunk_mib * 2**20
        layout = KVLayout("float32", (LayerLayout(nbytes // (TOKENS * 2 * 4 * 128), 128, 128),))
        self.store = open_store(f"file://{root}")
        blobs: Any = self.store.blobs
        blobs.write = SlowDisk(blobs, args.disk_mib * 2**20).write
        pages = POOL_CHUNKS * TOKENS // 16
        self.residents = ResidentChunks(PagedKVPool(layout, pages=pages, chunk_pages=pages))
        self.device = ThreadPoolExecutor(1)
        self.publisher = Publisher(
            *(self.residents, self.store),
            post=self.device.submit,
            nbytes_max=args.queue * layout.nbytes(TOKENS),
            threads=4,
            metrics=PublicationMetrics(CollectorRegistry(), "bench"),
        )
        model = ModelIdentity("bench")
        self.claims = ChunkClaims(self.store, self.publisher, model, layout, lambda _: NO_LIMITS)
        self.waits: list[float] = []
        self.unclaimed = 0

    def ask(self, client: int, until: float) -> None:
        number = 0
        while time.monotonic() < until:
            number += 1
            key = ChunkKey(f"{client:032x}{number:032x}")
            segment = Segment(ChunkId(key), ChunkType.CONTEXT, (client, number) * (TOKENS // 2))
            chunk = RequestChunk(0, segment, key, (), 0, DEFAULT_TENANT, visible=TOKENS)
            began = time.monotonic()
            (made,) = self.claims.compute_all(
                Composition((chunk,), None, ReuseMode.INDEPENDENT, ()), [0], FetchTerms("")
            )
            self.waits.append(time.monotonic() - began)
            time.sleep(COMPUTE_S)
            self.unclaimed += made.claim is None
            self.device.submit(self._computed, key, made.claim).result(WAIT_S)

    def _computed(self, key: ChunkKey, claim: Any) -> None:
        chunk = self.residents.reserve(key, TOKENS)
        chunk.ready = True
        if claim is not None:
            claim.publish(chunk)
        self.residents.release(chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--chunk-mib", type=int, default=1)
    parser.add_argument("--disk-mib", type=float, default=4.0)
    parser.add_argument("--queue", type=int, default=72)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cairn-bench-") as root:
        clients = Clients(Path(root), args)
        until = time.monotonic() + args.seconds
        with ThreadPoolExecutor(args.clients) as threads:
            list(threads.map(lambda client: clients.ask(client, until), range(args.clients)))
        waits = sorted(clients.waits)
        p50, p90, p99 = (waits[int(len(waits) * share)] for share in (0.5, 0.9, 0.99))
        clients.publisher.flush(WAIT_S)
        print(
            f"{len(waits) / args.seconds:.0f} answers/s; wait p50 {p50:.2f} p90 {p90:.2f} p99 {p99:.2f} max "
            f"{waits[-1]:.2f} s; of {len(waits)} documents {clients.store.stats().entries} stored, "
            f"{clients.unclaimed} not to be stored"
        )
        clients.publisher.stop(WAIT_S)
        clients.claims.stop()
        clients.device.shutdown()
        clients.store.close()


if __name__ == "__main__":
    main()
