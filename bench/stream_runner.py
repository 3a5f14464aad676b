"""A decode service whose device is a clock: everything is real but the forwards, which take a given time or none.

What is left is what a token costs the host: planning, delivery, text, messages, gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from bench.models import fable
from chunk_store.key import ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.open import open_store
from decode_service.api.service import DecodeService
from decode_service.device.worker import DecodeWorker
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.metrics import DecodeMetrics
from decode_service.prompt.resolver import Resolver
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.model.limits import ContextLimit
from engine.plan import CascadePlan
from engine.reuse import ReuseMode
from engine.run.planning import StepPlanner
from engine.run.protocol import StepRows
from engine.run.room import StepRoom
from engine.sampling.params import Choice, SamplingRequest
from engine.sampling.shaping import Bits
from serving.rpc.access import Access
from text.codec import TextCodec

LAYOUT = KVLayout("float32", (LayerLayout(1, 1, 1),))
CONTEXT = 40960
TOKENS = 4096  # ids that answers are made of, again and again


@dataclass
class Lateness:
    """How the host keeps up with a device: seconds from a step's end to the device thread's waking, and the device's
    time without work."""

    late_s: list[float] = field(default_factory=list)
    idle_s: float = 0.0
    busy_s: float = 0.0


@dataclass
class ClockStep:
    """A step that is over at ``ends_at``."""

    plan: CascadePlan
    choices: list[Choice]
    ends_at: float
    lateness: Lateness

    def draw(self, bitmasks: Bits) -> None:
        raise AssertionError("nobody asks for a grammar")

    def wait(self) -> list[Choice]:
        left_s = self.ends_at - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)  # without the interpreter, as a wait for a device
            self.lateness.late_s.append(time.monotonic() - self.ends_at)
        return self.choices

    def logits(self) -> Tensor:
        return torch.zeros(len(self.choices), 8)

    def scores(self) -> list[Choice]:
        return []


class ClockRunner:
    """Steps of ``step_s`` seconds, one after another, of everybody's rows; those in which nobody decodes take none.

    Each is begun with so many ``launches``, calls of torch.
    """

    runs_ahead = True
    piece_tokens = CONTEXT

    def __init__(self, pool: PagedKVPool, vocabulary: int, step_s: float, launches: int, slots: int) -> None:
        self.pool = pool
        self.slots = slots
        self._planner = StepPlanner(pool, 3)
        self.lateness = Lateness()
        self._step_s = step_s
        self._launches = launches
        self._here, self._there = torch.zeros(64), torch.ones(64)
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(100, vocabulary, (TOKENS,), generator=generator).tolist()
        self._at = 0
        self._free_at = 0.0

    def prepare(self) -> None: ...

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return False

    def room(self, *, decoding: bool) -> StepRoom:
        return StepRoom(512)

    def open(self, slot: int, request: SamplingRequest) -> None: ...

    def bitmasks(self, count: int) -> Bits:
        raise AssertionError("nobody asks for a grammar")

    def begin(self, batch: Sequence[StepRows]) -> ClockStep:
        for _ in range(self._launches):
            self._here.copy_(self._there)  # as every call of torch does, it lets go of the interpreter
        now = time.monotonic()
        decodes = batch[0].sources[0] < 0
        if self._step_s and decodes:
            if now - self._free_at < 1.0:
                self.lateness.idle_s += max(0.0, now - self._free_at)
            self.lateness.busy_s += self._step_s
            self._free_at = max(now, self._free_at) + self._step_s
        draws = sum(rows.draw is not None for rows in batch)
        self._at = (self._at + draws) % (TOKENS - draws)
        choices = [Choice(token_id, None) for token_id in self._ids[self._at : self._at + draws]]
        plan = self._planner.plan(batch, piece_tokens=self.piece_tokens)
        return ClockStep(plan, choices, self._free_at if decodes else 0.0, self.lateness)


class ClockServed:
    """What the service asks of a served model."""

    identity = ModelIdentity("ab" * 32)
    layout = LAYOUT
    context_length_max = CONTEXT
    eos_token_ids: frozenset[int] = frozenset()
    borrowed: Any = SimpleNamespace(name="clock", dtype_name="float32", dtype_reason="")

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.refusals = dict.fromkeys(ReuseMode, "")

    def limit(self, mode: ReuseMode = ReuseMode.EXACT) -> ContextLimit:
        return ContextLimit(CONTEXT, CONTEXT, "")


class _NoPrefill:
    def compute_all(self, composition: Any, indices: Any, terms: Any) -> Any:
        raise AssertionError("every chunk is resident")


def clock_service(store_url: str, streams: int, step_s: float, launches: int) -> tuple[DecodeService, ClockRunner]:
    """The service, and its runner. Call it where the event loop runs."""
    model = fable()
    served: Any = ClockServed(model.vocabulary)
    pool = PagedKVPool(LAYOUT, pages=2 * CONTEXT // 16 + streams * 256, chunk_pages=2 * CONTEXT // 16)
    runner = ClockRunner(pool, model.vocabulary, step_s, launches, streams)
    residents, codec = ResidentChunks(pool), TextCodec.load(str(model.path))
    chunks, registry = open_store(store_url), CollectorRegistry()
    resolver = Resolver(served, codec, chunks)
    worker = DecodeWorker(
        runner,
        residents,
        KVFetcher(chunks, _NoPrefill(), served.identity, resolver.register),
        DecodeMetrics(registry, model_name="clock", token_nbytes=LAYOUT.nbytes(1)),
        eos_token_ids=frozenset(),
        batch_max=streams,
        waiting_max=4 * streams,
    )
    service = DecodeService(
        worker, resolver, Access(), registry, model_name="clock", request_timeout_s=600.0, close=chunks.close
    )
    return service, runner
