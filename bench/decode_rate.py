"""Decode tokens a second over a shared context: ours, through the scheduler, beside transformers' generate.

Both start from a KV cache that holds the shared context already (ours resident, theirs a ``DynamicCache`` of
the whole batch), so only decoding is timed. The KV is random: its values do not change the work.
"""

from __future__ import annotations

import queue
import time
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from bench.models import BenchModel
from chunk_store.key import ChunkId, ChunkType
from decode_service.device.worker import DecodeWorker
from decode_service.metrics import DecodeMetrics
from decode_service.prompt.composition import compose
from decode_service.prompt.request_chunk import Segment
from decode_service.scheduling.sequence import Event, Finished, Sequence, Tokens
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.reuse import ReuseMode
from engine.sampling.params import SamplingParams, SamplingRequest
from engine.served import ServedModel

QUERY_TOKENS = 8


class DecodeRate:
    """Measures one served model; ``ours`` and ``theirs`` return decode tokens a second."""

    def __init__(self, model: BenchModel, served: ServedModel) -> None:
        self.model = model
        self.served = served

    def ours(self, shared: int, batch: int, steps: int, **sampling: float) -> float:
        """Through admission, scheduler, forwards and sampling; without RPC. Greedy unless ``sampling`` says more."""
        pages = -(-shared // 16) + batch * (-(-(QUERY_TOKENS + steps) // 16) + 1)
        pool = PagedKVPool(self.served.layout, pages=pages + 1, chunk_pages=-(-shared // 16))
        residents = ResidentChunks(pool)
        worker = DecodeWorker(
            self.served.make_runner(pool),
            residents,
            _NoSource(),  # type: ignore[arg-type]
            DecodeMetrics(CollectorRegistry(), model_name="bench", token_nbytes=self.served.layout.nbytes(1)),
            eos_token_ids=frozenset(),
            batch_max=batch,
        )
        document = tuple(self.model.prompt(shared, 1))
        self._make_resident(residents, document)
        events: queue.SimpleQueue[tuple[float, list[Event]]] = queue.SimpleQueue()
        for index in range(batch):
            worker.take_place()
            worker.submit(self._sequence(index, document, steps, events, sampling))
        worker.start()
        try:
            return _rate(events, batch)
        finally:
            worker.stop()

    def _make_resident(self, residents: ResidentChunks, document: tuple[int, ...]) -> None:
        segment = Segment(ChunkId("document"), ChunkType.CONTEXT, document)
        query = Segment(ChunkId(""), ChunkType.QUERY, (100,))
        keyed = compose(self.served, [segment, query], ReuseMode.EXACT, "").chunks[0]
        chunk = residents.reserve(keyed.key, len(document))
        for tensor in residents.pool.run_planes(chunk.run, chunk.tokens):
            tensor.normal_()
        chunk.ready = True

    def _sequence(self, index: int, document: tuple[int, ...], steps: int, events: Any, sampling: Any) -> Sequence:
        segments = [
            Segment(ChunkId("document"), ChunkType.CONTEXT, document),
            Segment(ChunkId(""), ChunkType.QUERY, tuple(self.model.prompt(QUERY_TOKENS, 100 + index))),
        ]
        params = SamplingParams(max_tokens=steps, ignore_eos=True, seed=index, **sampling)
        return Sequence(
            request_id=str(index),
            composition=compose(self.served, segments, ReuseMode.EXACT, ""),
            sampling=SamplingRequest(params, (), frozenset()),
            salt="",
            bypass=False,
            deliver=lambda batch: events.put((time.process_time(), batch)),
        )

    @torch.inference_mode()
    def theirs(self, shared: int, batch: int, steps: int) -> float:
        """``generate`` over a cache that holds the shared context for every row."""
        module: Any = self.served.borrowed.module
        module.set_attn_implementation("sdpa")
        cache = DynamicCache(config=module.config)
        for layer, geometry in enumerate(self.served.layout.layers):
            shape = (batch, geometry.kv_heads, shared, geometry.k_dim)
            dtype = next(module.parameters()).dtype
            cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)
        document = self.model.prompt(shared, 1)
        ids = torch.tensor([document + self.model.prompt(QUERY_TOKENS, 100 + index) for index in range(batch)])
        stamps: list[float] = []
        module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([_StampAfterStep(stamps)]),
        )
        return batch * (len(stamps) - 1) / (stamps[-1] - stamps[0])


def _rate(events: Any, batch: int) -> float:
    """Tokens a second over the second half of all tokens, when every request has joined."""
    arrivals: list[tuple[float, int]] = []
    done = 0
    while done < batch:
        at, events_of_one = events.get(timeout=600)
        arrivals.append((at, sum(len(e.choices) for e in events_of_one if isinstance(e, Tokens))))
        done += isinstance(events_of_one[-1], Finished)
    half, seen = sum(count for _, count in arrivals) // 2, 0
    for index, (at, count) in enumerate(arrivals):
        seen += count
        if seen >= half:
            return sum(count for _, count in arrivals[index + 1 :]) / (arrivals[-1][0] - at)
    raise ValueError("no tokens came")


class _NoSource:
    """Everything is resident; nothing is ever fetched."""

    model = ""


class _StampAfterStep(StoppingCriteria):
    """A stopping criterion that stops nothing and notes when each step ended."""

    def __init__(self, stamps: list[float]) -> None:
        self._stamps = stamps

    def __call__(self, ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self._stamps.append(time.process_time())
        return torch.zeros(ids.shape[0], dtype=torch.bool)
