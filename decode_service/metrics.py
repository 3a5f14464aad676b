"""Prometheus metrics of the decode service. Tokens are counted, ratios are left to the reader."""

from __future__ import annotations

import time
from collections import Counter as TimesOf
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from chunk_store.entry import MissReason
from decode_service.prompt.request_chunk import ChunkOutcome, Unpublished
from decode_service.scheduling.giving_way import GaveWay
from decode_service.scheduling.kept import KeptKV, NotKept
from decode_service.scheduling.sequence import Failed, Finished, FinishReason, Occupancy, Sequence
from engine.kv.source import KVSource
from engine.plan import CascadePlan
from serving.rpc.errors import STATUS_NAMES, status_name
from serving.trace.buckets import SECONDS_BUCKETS, SHORT_SECONDS_BUCKETS, TOKENS_BUCKETS
from serving.trace.bulk import BulkHistogram
from serving.trace.stages import StageClock

BATCH_BUCKETS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0, 512.0)


@dataclass(frozen=True)
class Steps:
    """Steps in which somebody decoded, the KV bytes that they read, and would have read without sharing."""

    steps: int = 0
    nbytes_read: int = 0
    nbytes_flat: int = 0


class DecodeMetrics:
    """Counters and histograms in a registry of its own; ``watch_worker`` adds gauges that are read when scraped."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str, token_nbytes: int) -> None:
        self.registry = registry
        self._model = model_name
        self._token_nbytes = token_nbytes
        self._last_token: dict[int, float] = {}
        self.steps = Steps()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cairn_{name}", text, ("model_name", *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> Histogram:
            return Histogram(f"cairn_{name}", text, ("model_name",), buckets=buckets, registry=registry)

        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that reached their first token")
        self._by_source = counter("prompt_tokens_by_source", "Prompt tokens by where their KV came from", "source")
        self._misses = counter("cache_misses", "Chunks of answered prompts whose KV had to be computed", "reason")
        self._unpublished = counter("unpublished_chunks", "Chunks computed here that the store did not take", "reason")
        self._kept = counter("kept_turns", "Turns that were to be kept, by what became of their KV", "outcome")
        self._gave_way = counter("preemptions", "Requests that gave up their pages and wait to go on", "reason")
        self._gave_back = counter(
            "kv_pages_given_back",
            "Pages that an answer gave back while it went on, because no layer sees them any more",
        )
        self._generated = counter("generation_tokens", "Tokens generated")
        self._success = counter("request_success", "Answers by how they ended", "finished_reason")
        self._failures = counter("request_failure", "Admitted requests that ended with an error", "code")
        self._bytes_read = counter("decode_bytes_read", "KV bytes that steps read in which somebody decodes")
        self._bytes_flat = counter("decode_bytes_flat", "KV bytes that a cache without sharing would have read")
        self._steps = counter("decode_steps", "Steps in which somebody decodes")
        self._ttft = histogram("time_to_first_token_seconds", "Arrival of the RPC to its first token on the way back")
        self._inter_token = BulkHistogram(
            "cairn_inter_token_latency_seconds",
            "Between two tokens of a request",
            ("model_name", model_name),
            SHORT_SECONDS_BUCKETS,
        )
        registry.register(self._inter_token)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token")
        self._queue = histogram("request_queue_time_seconds", "Submission to admission", SHORT_SECONDS_BUCKETS)
        self._prefill = histogram("request_prefill_time_seconds", "Admission to first token")
        self._decode = histogram("request_decode_time_seconds", "First to last token")
        self._prompt_length = histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS_BUCKETS)
        self._answer_length = histogram("request_generation_tokens", "Tokens of an answer", TOKENS_BUCKETS)
        self._batch = histogram("decode_batch_size", "Requests that decode in a step", BATCH_BUCKETS)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Every label value is there before anything happens: ``increase()`` does not see a series being born."""
        each: tuple[tuple[Counter, Iterable[str]], ...] = (
            (self._by_source, KVSource),
            (self._misses, MissReason),
            (self._unpublished, Unpublished),
            (self._kept, (*KeptKV, *NotKept)),
            (self._gave_way, GaveWay),
            (self._success, FinishReason),
            (self._failures, STATUS_NAMES),
        )
        for counter, values in each:
            for value in values:
                counter.labels(self._model, str(value))
        plain: tuple[Counter | Histogram, ...] = (
            *(self._prompt_tokens, self._generated, self._bytes_read, self._bytes_flat, self._steps, self._gave_back),
            *(self._ttft, self._e2e, self._queue, self._prefill, self._decode),
            *(self._prompt_length, self._answer_length, self._batch),
        )
        for metric in plain:
            metric.labels(self._model)

    def watch_worker(self, occupancy: Callable[[], Occupancy]) -> None:
        """Gauges of what the worker is doing, read when Prometheus asks."""
        self._watch("num_requests_running", "Requests admitted", lambda: occupancy().running)
        self._watch("num_requests_waiting", "Requests waiting for admission", lambda: occupancy().waiting)
        self._watch("chunks_resident", "Chunks in the KV pool", lambda: occupancy().chunks_resident)
        self._watch("kv_cache_usage_perc", "Share of the pool's pages in use, 0 to 1", lambda: occupancy().usage)
        pages = Gauge("cairn_kv_pages", "Pages by owner", ("model_name", "owner"), registry=self.registry)
        for owner in ("free", "chunk", "tail"):
            pages.labels(self._model, owner).set_function(partial(lambda owner: occupancy().pages[owner], owner))

    def _watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        gauge = Gauge(f"cairn_{name}", text, ("model_name",), registry=self.registry)
        gauge.labels(self._model).set_function(read)

    def prefilled(self, sequence: Sequence) -> None:
        """An answer has reached its first token: its prompt is accounted for, once, hit + computed = prompt."""
        clock = sequence.clock
        if sequence.answer == 0:
            self._count_prompt(sequence)
        self._queue.labels(self._model).observe(clock.spent_ns()["queue"] / 1e9)
        self._prefill.labels(self._model).observe((clock.first_token - clock.admitted) / 1e9)
        self._generated.labels(self._model).inc()
        self._last_token[id(sequence)] = time.monotonic()

    def _count_prompt(self, sequence: Sequence) -> None:
        composition = sequence.composition
        by_source = dict.fromkeys(KVSource, 0)
        for chunk in composition.chunks:
            outcome = chunk.outcome or ChunkOutcome(KVSource.COMPUTED)
            by_source[outcome.source] += chunk.cached_tokens
            if outcome.miss_reason is not None:
                self._misses.labels(self._model, outcome.miss_reason.value).inc()
            if outcome.unpublished is not None:
                self._unpublished.labels(self._model, outcome.unpublished.value).inc()
        by_source[KVSource.COMPUTED] = composition.prompt_tokens - sum(by_source.values())
        for source, tokens in by_source.items():
            self._by_source.labels(self._model, source.value).inc(tokens)
        self._prompt_tokens.labels(self._model).inc(composition.prompt_tokens)
        self._prompt_length.labels(self._model).observe(composition.prompt_tokens)

    def gave_way(self, why: GaveWay) -> None:
        """A request gave up its pages."""
        self._gave_way.labels(self._model, why.value).inc()

    def gave_back(self, pages: int) -> None:
        """Answers gave pages back and went on."""
        if pages:
            self._gave_back.labels(self._model).inc(pages)

    def kept(self, kv: KeptKV, why: NotKept | None) -> None:
        """A request that keeps its turn has ended; ``why`` it is not registered, or its KV not kept."""
        self._kept.labels(self._model, (why or kv).value).inc()

    def first_token_sent(self, clock: StageClock) -> None:
        """A first token is handed to the transport: until here its caller waits for us."""
        self._ttft.labels(self._model).observe((time.monotonic_ns() - clock.arrived) / 1e9)

    def stepped(self, plan: CascadePlan, tokens_flat: int, sequences: list[Sequence]) -> None:
        """A step in which somebody decodes gave each sequence one token; slices of prompts may have been in it.

        ``tokens_flat``: KV tokens that it would have read without sharing.
        """
        read, flat = plan.tokens_read * self._token_nbytes, tokens_flat * self._token_nbytes
        done = self.steps
        self.steps = Steps(done.steps + 1, done.nbytes_read + read, done.nbytes_flat + flat)
        self._bytes_read.labels(self._model).inc(read)
        self._bytes_flat.labels(self._model).inc(flat)
        self._steps.labels(self._model).inc()
        self._generated.labels(self._model).inc(len(sequences))
        self._batch.labels(self._model).observe(len(sequences))
        now = time.monotonic()
        last = [self._last_token[id(sequence)] for sequence in sequences]
        for before, times in TimesOf(last).items():  # one, or few: those of a step have them at the same moment
            self._inter_token.observe(now - before, times)
        self._last_token.update(dict.fromkeys(map(id, sequences), now))

    def forced(self) -> None:
        """A sequence has a token that its grammar forced, beside the one of a step."""
        self._generated.labels(self._model).inc()

    def ended(self, sequence: Sequence, event: Finished | Failed) -> None:
        """A request has ended, wherever it stood."""
        self._last_token.pop(id(sequence), None)
        if isinstance(event, Failed):
            self._failures.labels(self._model, status_name(event.error)).inc()
            return
        spent_ns = sequence.clock.spent_ns()
        self._success.labels(self._model, event.reason.value).inc()
        self._e2e.labels(self._model).observe(spent_ns["total"] / 1e9)
        if sequence.generated:
            self._answer_length.labels(self._model).observe(len(sequence.generated))
            self._decode.labels(self._model).observe(spent_ns["decode"] / 1e9)
