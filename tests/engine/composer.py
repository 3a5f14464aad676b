"""Runs compositions on the engine alone, as the decode service does, without store, RPC or scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunk, ResidentChunks
from engine.plan import PlacedChunk, StepSequence, behind_each_other
from engine.reuse import ReuseMode, key_composition
from engine.run.pieces import prefill_chunk, prefill_tail
from engine.run.protocol import StepRows
from engine.sampling.params import Draw
from engine.served import ServedModel

Request = tuple[list[list[int]], list[int], str]  # chunks, query, mode


@dataclass
class _Running:
    placed: tuple[PlacedChunk, ...]
    held: list[ResidentChunk]
    pages: tuple[int, ...]
    tail_tokens: int
    start: int
    generated: list[int]
    logits: list[torch.Tensor]

    def row(self, slot: int) -> StepRows:
        """The row of the last token, which was drawn in ``slot``."""
        position = self.start + self.tail_tokens
        sequence = StepSequence(self.placed, self.pages, self.tail_tokens, 1, position)
        return StepRows(sequence, [~slot], Draw(slot, len(self.generated), position + 1))


class Composer:
    """A pool, its resident chunks and a runner over one served model."""

    def __init__(self, served: ServedModel, *, pages: int = 512, page_size: int = 16, **options: Any) -> None:
        self.served = served
        device = served.borrowed.device
        self.pool = PagedKVPool(served.layout, pages=pages, chunk_pages=pages // 2, page_size=page_size, device=device)
        self.residents = ResidentChunks(self.pool)
        self.runner = served.make_runner(self.pool, **options)
        self.computed = 0  # chunk tokens run through the model
        self.plans: list[object] = []

    def hold(self, chunks: Sequence[list[int]], mode: str) -> tuple[list[ResidentChunk], tuple[PlacedChunk, ...]]:
        """Makes every chunk of a composition resident and holds it."""
        keyed = key_composition(self.served.identity, [tuple(c) for c in chunks], ReuseMode(mode))
        held: list[ResidentChunk] = []
        for chunk in keyed:
            resident = self.residents.acquire(chunk.key)
            if resident is None:
                resident = self.residents.reserve(chunk.key, len(chunk.token_ids))
                context = self._placed((held[i], 0) for i in chunk.context)
                prefill_chunk(self.runner, chunk.token_ids, context, resident.run)
                resident.ready = True
                self.computed += len(chunk.token_ids)
            held.append(resident)
        return held, self._placed(zip(held, (k.offset for k in keyed), strict=True))

    def _placed(self, chunks: Iterable[tuple[ResidentChunk, int]]) -> tuple[PlacedChunk, ...]:
        size = self.pool.page_size
        return behind_each_other((chunk.first_slot(size), chunk.tokens, offset) for chunk, offset in chunks)

    def generate(self, requests: Sequence[Request], count: int) -> list[tuple[list[int], torch.Tensor]]:
        """Decodes all requests as one batch; greedy tokens and logits (count, vocabulary) of each."""
        running = [self._start(*request, count, slot) for slot, request in enumerate(requests)]
        for _ in range(count - 1):
            step = self.runner.begin([r.row(slot) for slot, r in enumerate(running)])
            logits = step.logits()
            self.plans.append(step.plan)
            for row, request in enumerate(running):
                request.tail_tokens += 1
                request.logits.append(logits[row].clone())
                request.generated.append(int(logits[row].argmax()))
        for request in running:
            self.pool.release_pages(request.pages)
            for chunk in request.held:
                self.residents.release(chunk)
        self.residents.check_integrity()
        return [(r.generated, torch.stack(r.logits)) for r in running]

    def _start(self, chunks: list[list[int]], query: list[int], mode: str, count: int, slot: int) -> _Running:
        held, placed = self.hold(chunks, mode)
        pages = self.pool.allocate_pages(self.pool.pages_for(len(query) + count))
        assert pages is not None
        start = sum(map(len, chunks))
        logits = prefill_tail(self.runner, query, placed, pages, start=start, slot=slot)
        return _Running(placed, held, tuple(pages), len(query), start, [int(logits.argmax())], [logits.clone()])
