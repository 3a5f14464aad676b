"""A fake runner whose tokens are a function of what their rows can see, and of what they are drawn with.

A mistake of order, slot, source, place, position or seed gives another token. What a row sees is read from the pool, so
KV that is not there yet, or not any more, shows too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chunk_store.entry import MissReason
from chunk_store.key import ChunkId, ChunkKey, ChunkType
from chunk_store.tenant import DEFAULT_TENANT
from decode_service.kv_source.asking import Wanted
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk, Segment, Unpublished
from decode_service.scheduling.sequence import Sequence as Request
from engine.kv.source import KVSource
from engine.plan import StepSequence
from engine.reuse import ReuseMode
from engine.run.protocol import StepRows
from engine.sampling.params import Choice, SamplingParams, SamplingRequest
from tests.fakes import MODEL, FakeRunner, FakeStep

TOKENS = 48  # ids that are drawn
EOS = 3
PRIME = 1_000_003


@dataclass
class ContentRunner(FakeRunner):
    """``long``: chunks of more tokens run alone even where the rest is packed.

    ``log``: which step was b(egun) and w(aited for), in order. ``lost`` fails when it is waited for.
    """

    long: int = 1 << 30
    log: list[tuple[str, int]] = field(default_factory=list)
    lost: int = 0

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return not self.packs or (chunk and tokens > self.long)

    def begin(self, batch: Sequence[StepRows]) -> Any:
        step, number = super().begin(batch), len(self.batches)
        self.log.append(("b", number))
        return Logged(step, self, number)

    def token(self, rows: StepRows, ids: list[int]) -> int:
        draw, sequence, size = rows.draw, rows.sequence, self.pool.page_size
        assert draw is not None and draw.position == sequence.position + len(ids)
        slots = [at for chunk in sequence.chunks for at in range(chunk.first_slot, chunk.first_slot + chunk.tokens)]
        ends = sequence.tail_tokens + sequence.rows
        slots += [sequence.tail_pages[at // size] * size + at % size for at in range(ends)]
        seen = self.pool.keys[0][slots, 0, 0].long() * 31 + self.pool.values[0][slots, 0, 0].long() * 7
        mixed = draw.index * 13 + draw.position * 5 + self.requests[draw.slot].params.seed
        mixed += sum(chunk.offset * place for place, chunk in enumerate(sequence.chunks, start=1))
        for at, value in enumerate(seen.tolist(), start=1):
            mixed = (mixed * 33 + value * at + 1) % PRIME
        return mixed % TOKENS

    def _write(self, sequence: StepSequence, ids: Sequence[int]) -> None:
        size = self.pool.page_size
        for row, token in enumerate(ids):
            at = sequence.tail_tokens + row
            slot = sequence.tail_pages[at // size] * size + at % size
            self.pool.keys[0][slot] = float(token)
            self.pool.values[0][slot] = float(sequence.position + row)


@dataclass
class Logged:
    step: FakeStep
    runner: ContentRunner
    number: int

    @property
    def plan(self) -> Any:
        return self.step.plan

    def wait(self) -> list[Choice]:
        self.runner.log.append(("w", self.number))
        if self.runner.lost == self.number:
            raise RuntimeError("the device is gone")
        return self.step.wait()


class NothingStored:
    """A source that leaves all KV to be computed where it is wanted."""

    model = MODEL

    def fetch(self, composition: Any, wanted: Sequence[Wanted], caller: Any) -> dict[str, int]:
        for want in wanted:
            want.outcome = ChunkOutcome(KVSource.COMPUTED, MissReason.NOT_STORED, Unpublished.STORE_FULL)
        return {"lookup": 1}


def content_request(name: str, rng: random.Random, *, max_tokens: int | None = None) -> Request:
    """A request with content of its own, over some of six documents that several requests have."""
    documents = [
        Segment(ChunkId(f"d{n}"), ChunkType.CONTEXT, tuple((n * 11 + at * at) % 97 for at in range(1 + n * n)))
        for n in rng.sample(range(6), rng.choice((0, 1, 1, 2, 3)))
    ]
    start, chunks = 0, []
    for index, segment in enumerate(documents):
        tokens = len(segment.token_ids)
        chunks.append(RequestChunk(index, segment, ChunkKey(segment.chunk_id), (), start, DEFAULT_TENANT, tokens))
        start += tokens
    tail = tuple(rng.randrange(97) for _ in range(rng.choice((1, 2, 5, 9, 30))))
    query = Segment(ChunkId(""), ChunkType.QUERY, tail)
    composition = Composition(tuple(chunks), query, ReuseMode.INDEPENDENT, tail, DEFAULT_TENANT)
    most = max_tokens or rng.choice((1, 2, 7, 25))
    params = SamplingParams(max_tokens=most, min_tokens=rng.randint(0, most), seed=rng.randrange(1000))
    bypass = rng.random() < 0.2
    return Request(name, composition, SamplingRequest(params), salt="", bypass=bypass, deliver=lambda _: None)
