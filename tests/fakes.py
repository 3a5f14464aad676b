"""Stand-ins for a served model and its runner: unit tests need no weights and no forward.

The store, the pool and the tokenizer beside them are real ones, small.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

from chunk_store.key import ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from engine.check.rows import RowBits
from engine.kv.pool import PagedKVPool
from engine.model.limits import ContextLimit
from engine.plan import PlacedChunk, StepSequence
from engine.reuse import ReuseMode
from tests.tokenizer_for_tests import VOCABULARY, byte_level_tokenizer
from text.codec import TextCodec

LAYOUT = KVLayout("float32", (LayerLayout(1, 4, 4),))
MODEL = ModelIdentity("ab" * 32)
END = 1  # the model's end token


@cache
def codec() -> TextCodec:
    return TextCodec(byte_level_tokenizer(), "tiny")


@dataclass
class FakeServed:
    """What services ask of a ``ServedModel``, without a model."""

    context_length_max: int = 64
    refusals: dict[ReuseMode, str] = field(default_factory=lambda: dict.fromkeys(ReuseMode, ""))
    identity: ModelIdentity = MODEL
    layout: KVLayout = LAYOUT
    vocabulary: int = VOCABULARY
    eos_token_ids: frozenset[int] = frozenset({END})
    borrowed: Any = field(default_factory=lambda: SimpleNamespace(name="tiny", dtype_name="float32", dtype_reason=""))
    row_bits: RowBits | None = None

    def limit(self, mode: ReuseMode = ReuseMode.EXACT) -> ContextLimit:
        return ContextLimit(self.context_length_max, self.context_length_max, "")


@dataclass
class FakeRunner:
    """Writes its token ids into the pool instead of computing; ``before`` is called first."""

    pool: PagedKVPool
    before: Callable[[], None] = lambda: None
    piece_tokens: int = 64
    computed: list[tuple[tuple[int, ...], tuple[PlacedChunk, ...]]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def prefill(self, token_ids: Sequence[int], sequence: StepSequence, *, logits: bool) -> None:
        self.before()
        self.threads.add(threading.current_thread().name)
        self.computed.append((tuple(token_ids), sequence.chunks))
        size = self.pool.page_size
        for at, token in enumerate(token_ids, start=sequence.tail_tokens):
            slot = sequence.tail_pages[at // size] * size + at % size
            for tensor in (*self.pool.keys, *self.pool.values):
                tensor[slot] = float(token)


def small_pool(pages: int = 16, page_size: int = 4) -> PagedKVPool:
    return PagedKVPool(LAYOUT, pages=pages, chunk_pages=pages, page_size=page_size)
