"""The workloads of the GPU benchmark on the engine alone: decode steps and times to first token."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from bench.gpu_model import KV_TOKEN_NBYTES, PAGE_SIZE, WEIGHT_NBYTES_READ, Engine
from chunk_store.entry import EntryHeader, MissReason
from chunk_store.key import ChunkId, ChunkKey, digest
from chunk_store.landing import Landing
from chunk_store.open import open_store
from chunk_store.store import Busy, ChunkStore, Stored
from engine.kv.host_tier import HostTier
from engine.kv.pages import PageRun
from engine.plan import PlacedChunk, StepSequence, behind_each_other
from engine.run.cuda.runner import LONG, PackedRunner
from engine.run.pieces import GREEDY, prefill_chunk, prefill_tail
from engine.run.protocol import StepRows
from engine.sampling.params import Draw

QUERY_TOKENS = 64


@dataclass(frozen=True)
class Result:
    """One workload, in milliseconds: ours, the floor, and where known what others reach, the first target, the goal."""

    name: str
    ours: float
    floor: float
    others: float | None = None
    target: float | None = None
    goal: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Tree:
    """``rows`` decode rows, ``levels`` of (rows that share a chunk, its tokens), ``own`` tail tokens."""

    rows: int
    levels: tuple[tuple[int, int], ...]
    own: int

    @property
    def tokens(self) -> int:
        """KV tokens a step reads, each once."""
        return sum(self.rows // group * tokens for group, tokens in self.levels) + self.rows * self.own


def decode_floor_ms(tree: Tree, bytes_a_second: float) -> float:
    """The fewest bytes of a decode step over the copy bandwidth."""
    return (WEIGHT_NBYTES_READ + tree.tokens * KV_TOKEN_NBYTES) / bytes_a_second * 1e3


def decode_ms(engine: Engine, tree: Tree, *, steps: int = 48, prompts: Sequence[int] = ()) -> tuple[float, float]:
    """Wall and host milliseconds a step: step n + 1 is prepared while step n runs, each token is read once.

    ``prompts``: rows of prompts that each step computes besides, over the first decode row's chunks.
    """
    runner, pool = engine.runner, engine.pool
    chunks, slot = _chunks(tree)
    assert slot <= pool.chunk_pages * PAGE_SIZE, "the pool is too small"
    pages = [_pages(engine, tree.own + steps + 16) for _ in range(tree.rows)]
    context = [sum(chunk.tokens for chunk in own) for own in chunks]
    slices = [
        StepRows(StepSequence(chunks[0], _pages(engine, rows), 0, rows, context[0]), [1] * rows) for rows in prompts
    ]

    def batch(step: int) -> list[StepRows]:
        own = tree.own + step
        rows = enumerate(zip(chunks, pages, context, strict=True))
        return [
            *(
                StepRows(
                    StepSequence(c, p, own - 1, 1, start + own - 1),
                    [~slot if step else 1],
                    Draw(slot, step, start + own),
                )
                for slot, (c, p, start) in rows
            ),
            *slices,
        ]

    host = 0.0
    for slot in range(tree.rows):
        runner.open(slot, GREEDY)
    pending = runner.begin(batch(0))
    for step in range(1, 9):
        following = runner.begin(batch(step))
        pending.wait()
        pending = following
    torch.cuda.synchronize()
    started = time.perf_counter()
    for step in range(9, 9 + steps - 8):
        at = time.perf_counter()
        following = runner.begin(batch(step))
        host += time.perf_counter() - at
        pending.wait()
        pending = following
    pending.wait()
    wall = time.perf_counter() - started
    for own in (*pages, *(rows.sequence.tail_pages for rows in slices)):
        pool.release_pages(own)
    return wall / (steps - 8) * 1e3, host / (steps - 8) * 1e3


def _pages(engine: Engine, tokens: int) -> tuple[int, ...]:
    pages = engine.pool.allocate_pages(engine.pool.pages_for(tokens))
    assert pages is not None, "the pool is too small"
    return tuple(pages)


def packed_ms(engine: Engine, rows: int, *, tokens: int = LONG) -> float:
    """Milliseconds of a chunk of ``tokens`` tokens that is nowhere yet, in packed steps of ``rows`` rows."""
    runner = engine.runner
    if runner.steps.rows != rows:
        runner = PackedRunner(runner.forward, rows_max=rows, slots=1)
    ids, run = random_tokens(tokens, 1), engine.pool.allocate_run(tokens)
    assert run is not None and not runner.alone(tokens, chunk=True)

    def compute() -> None:
        prefill_chunk(runner, ids, (), run)
        torch.cuda.synchronize()

    ms = median_ms(compute, repeats=6)
    engine.pool.release_run(run)
    return ms


def _chunks(tree: Tree) -> tuple[list[tuple[PlacedChunk, ...]], int]:
    slot = 0
    chunks: list[list[tuple[int, int, int]]] = [[] for _ in range(tree.rows)]
    for group, tokens in tree.levels:
        for first in range(0, tree.rows, group):
            for row in range(first, first + group):
                chunks[row].append((slot, tokens, 0))
            slot += -(-tokens // PAGE_SIZE) * PAGE_SIZE
    return [behind_each_other(own) for own in chunks], slot


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 151936, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def median_ms(run: Callable[[], object], *, repeats: int, warm: int = 2) -> float:
    """Median wall milliseconds of ``run``, which ends with a token on the host."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def first_token(engine: Engine, placed: Sequence[PlacedChunk], query: Sequence[int]) -> int:
    """Prefills a query behind resident chunks and picks a token."""
    start = sum(chunk.tokens for chunk in placed)
    pages = engine.pool.allocate_pages(engine.pool.pages_for(len(query)))
    assert pages is not None
    token = int(prefill_tail(engine.runner, query, placed, pages, start=start).argmax())
    engine.pool.release_pages(pages)
    return token


def warm_ms(engine: Engine, lengths: Sequence[int], *, moved: bool) -> float:
    """Time to first token behind resident chunks; ``moved``: each was computed at position 0."""
    placed, slot, start = [], 0, 0
    for tokens in lengths:
        placed.append(PlacedChunk(slot, tokens, start if moved else 0, start))
        slot += -(-tokens // PAGE_SIZE) * PAGE_SIZE
        start += tokens
    query = random_tokens(QUERY_TOKENS, 3)
    return median_ms(lambda: first_token(engine, placed, query), repeats=12)


def cold_ms(engine: Engine, tokens: int, *, repeats: int = 3) -> float:
    """Time to first token of a chunk that is nowhere yet and a query behind it."""
    ids, query = random_tokens(tokens, 1), random_tokens(QUERY_TOKENS, 2)

    def run() -> None:
        chunk = engine.pool.allocate_run(tokens)
        assert chunk is not None
        prefill_chunk(engine.runner, ids, (), chunk)
        first_token(engine, [PlacedChunk(chunk.first * PAGE_SIZE, tokens, 0, 0)], query)
        engine.pool.release_run(chunk)

    return median_ms(run, repeats=repeats, warm=1)


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy, read and written bytes counted."""
    a = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_()
    b = torch.empty_like(a)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        b.copy_(a)
    start.record()
    for _ in range(10):
        b.copy_(a)
    end.record()
    end.synchronize()
    return 2 * a.nbytes * 10 / start.elapsed_time(end) * 1e3


def decode_kernels(engine: Engine, tree: Tree, *, most: int = 16) -> str:
    """A table of the kernels of three decode steps, by device time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        decode_ms(engine, tree, steps=11)
    rows = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)[:most]
    return "\n".join(f"{e.device_time_total / 1e3:9.2f} ms {e.count:6d} x {e.key[:100]}" for e in rows)


@dataclass(frozen=True)
class StoredMs:
    """Times to first token of documents that are not resident, milliseconds."""

    store: float
    load_from_store: float
    host: float
    load_from_host: float


def stored_ms(engine: Engine, lengths: Sequence[int], *, folder: str = "/dev/shm", loaders: int = 4) -> StoredMs:
    """TTFT with chunks in a store of memory files, and with those chunks in the pinned host tier."""
    runs = [engine.pool.allocate_run(tokens) for tokens in lengths]
    assert all(run is not None for run in runs)
    ids = [tuple(random_tokens(tokens, 10 + i)) for i, tokens in enumerate(lengths)]
    keys = [ChunkKey(digest("cairn.bench", [str(i).encode()])) for i in range(len(lengths))]
    placed, start = [], 0
    for run, tokens in zip(runs, lengths, strict=True):
        placed.append(PlacedChunk(run.first * PAGE_SIZE, tokens, start, start))  # type: ignore[union-attr]
        start += tokens
    query = random_tokens(QUERY_TOKENS, 3)
    nbytes = sum(engine.findings.layout.nbytes(tokens) + (1 << 20) for tokens in lengths)
    times: dict[str, list[float]] = {"store": [], "load_from_store": [], "host": [], "load_from_host": []}
    with tempfile.TemporaryDirectory(dir=folder) as place, ThreadPoolExecutor(loaders) as pool:
        store = open_store(f"file://{place}", capacity_nbytes=2 * nbytes)
        for run, key, own in zip(runs, keys, ids, strict=True):
            _publish(engine, store, run, key, own)  # type: ignore[arg-type]
        for _ in range(4):
            load = partial(_load, engine, store, HostTier(nbytes, "cuda"))
            for source in ("store", "host"):
                torch.cuda.synchronize()
                at = time.perf_counter()
                list(pool.map(load, runs, keys, ids))
                loaded = time.perf_counter()
                first_token(engine, placed, query)
                times[source].append((time.perf_counter() - at) * 1e3)
                times[f"load_from_{source}"].append((loaded - at) * 1e3)
            del load
        store.close()
    for run in runs:
        engine.pool.release_run(run)  # type: ignore[arg-type]
    return StoredMs(**{name: statistics.median(seen[1:]) for name, seen in times.items()})


def _load(engine: Engine, store: ChunkStore, tier: HostTier, run: PageRun, key: ChunkKey, ids: tuple[int, ...]) -> None:
    def read(landing: Landing) -> MissReason | None:
        return store.land(key, ids, landing)

    _, reason = tier.load(key, engine.pool.run_planes(run, len(ids)), read)
    if reason is not None:
        raise RuntimeError(f"the store lost {key}: {reason}")


def _publish(engine: Engine, store: ChunkStore, run: PageRun, key: ChunkKey, ids: tuple[int, ...]) -> None:
    header = EntryHeader(key, ChunkId(key), engine.identity, engine.findings.layout, ids, ())
    publication = store.begin(key)
    assert not isinstance(publication, Busy | Stored)
    parts = [part.cpu() for part in engine.pool.run_planes(run, len(ids))]
    publication.write(header, [part.reshape(-1).view(torch.uint8).numpy().data.cast("B") for part in parts])
    publication.commit()
