"""Two ways of answering one request, run here on a model directory, and where they part.

No service is asked: the model is loaded as a service would load it, so that its identity, and with it the keys of
stored KV, are the services'.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from chunk_store.key import ChunkKey
from chunk_store.shared_store import SharedStore
from engine.compare.divergence import TOLERANCE, Divergence, compare
from engine.compare.trace import LoadStored, Trace, trace_eager, trace_engine
from engine.kv.pages import PageRun
from engine.kv.pool import PagedKVPool
from engine.kv.pool_bytes import incoming
from engine.reuse import ReuseMode
from engine.served import ServedModel

FRESH, STORED, EAGER = "fresh", "stored", "eager"
WAYS = (FRESH, STORED, EAGER)


@dataclass(frozen=True)
class Way:
    """``kind``: fresh (our engine computes everything), stored (it loads what the store has), eager (transformers)."""

    kind: str
    mode: ReuseMode

    def __str__(self) -> str:
        return f"{self.kind}:{self.mode.value}"


@dataclass(frozen=True)
class Comparison:
    """``lengths`` are the tokens of each segment, the query last; ``sources_*`` say where each chunk's KV came from."""

    a: Way
    b: Way
    lengths: list[int]
    dtype: str
    tolerance: float
    found: Divergence
    sources_a: list[str]
    sources_b: list[str]

    def segment_of(self, token: int) -> tuple[int, int]:
        """The segment that a token belongs to, and its place in it."""
        for index, length in enumerate(self.lengths):
            if token < length:
                return index, token
            token -= length
        raise IndexError(token)


def read_way(word: str) -> Way:
    """``exact``, ``eager``, ``stored:anchored`` and the like: a kind, a mode or both. Raises ``ValueError``."""
    first, _, second = word.partition(":")
    kind, mode = (first, second or ReuseMode.EXACT) if first in WAYS else (FRESH, first)
    if mode not in list(ReuseMode) or (first not in WAYS and second):
        modes = ", ".join(ReuseMode)
        raise ValueError(f"{word!r} is not a way of answering; write {', '.join(WAYS)} with :MODE, or a MODE: {modes}")
    return Way(kind, ReuseMode(mode))


def run_comparison(
    served: ServedModel,
    segments: Sequence[tuple[int, ...]],
    ways: tuple[Way, Way],
    *,
    store: AbstractContextManager[SharedStore] | None = None,
    salt: str = "",
    tolerance: float | None = None,
) -> Comparison:
    """Answers ``segments`` (the query last) both ways. Raises ``ValueError`` if it cannot compare.

    ``store`` is entered only if a way loads from it. Without ``tolerance`` it is the dtype's; 0 for stored
    against fresh of one mode, which have the same bits.
    """
    for way in ways:
        if sum(map(len, segments)) > served.limit(way.mode).tokens:
            raise ValueError(f"{sum(map(len, segments))} tokens are more than {way.mode} has: {served.limit(way.mode)}")
    with ExitStack() as ends:
        place = ends.enter_context(store) if store is not None and any(way.kind == STORED for way in ways) else None
        a, b = (_trace(served, segments, way, place, salt) for way in ways)
    same = ways[0].mode == ways[1].mode and EAGER not in (ways[0].kind, ways[1].kind)
    if tolerance is None:
        tolerance = 0.0 if same else TOLERANCE[served.layout.dtype]
    lengths = [len(segment) for segment in segments]
    return Comparison(*ways, lengths, served.layout.dtype, tolerance, compare(a, b), a.sources, b.sources)


def _trace(
    served: ServedModel, segments: Sequence[tuple[int, ...]], way: Way, store: SharedStore | None, salt: str
) -> Trace:
    *chunks, query = segments
    if way.kind == EAGER:
        return trace_eager(served, chunks, query, way.mode)
    load = None if store is None or way.kind == FRESH else _load_from(store)
    return trace_engine(served, chunks, query, way.mode, salt=salt, load=load)


def _load_from(store: SharedStore) -> LoadStored:
    def load(key: ChunkKey, token_ids: Sequence[int], pool: PagedKVPool, run: PageRun) -> str:
        with incoming(pool, run, len(token_ids)) as buffers:
            reason = store.load(key, token_ids, buffers)
        return "" if reason is None else reason.value

    return load
