"""Stand-ins for a served model and its runner: unit tests need no weights and no forward.

The store, the pool and the tokenizer beside them are real ones, small.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunk_store.key import ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from engine.check.rows import RowBits
from engine.kv.pool import PagedKVPool
from engine.model.limits import ContextLimit
from engine.plan import CascadePlan, PlacedChunk, StepSequence, plan_levels, plan_step
from engine.reuse import ReuseMode
from engine.run.backends import TORCH, Decision
from engine.run.planning import check_batch
from engine.run.protocol import StepRows
from engine.run.room import StepRoom
from engine.sampling.params import Choice, SamplingRequest
from engine.sampling.shaping import Bits
from engine.sight import EVERYTHING, Sight
from tests.tokenizer_for_tests import VOCABULARY, byte_level_tokenizer
from text.codec import TextCodec

LAYOUT = KVLayout("float32", (LayerLayout(1, 4, 4),))
MODEL = ModelIdentity("ab" * 32)
END = 1  # the model's end token
WORDS = 64  # tokens that a fake runner's logits tell apart


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
    decision: Decision = field(default_factory=lambda: Decision("eager", TORCH, "the device is cpu"))
    sight: Sight = EVERYTHING

    def limit(self, mode: ReuseMode = ReuseMode.EXACT) -> ContextLimit:
        return ContextLimit(self.context_length_max, self.context_length_max, "")


@dataclass
class FakeStep:
    """A step whose tokens are known at once."""

    plan: CascadePlan
    choices: list[Choice]

    def draw(self, bitmasks: Bits) -> None:
        raise RuntimeError("draw: the step has drawn when it began")

    def wait(self) -> list[Choice]:
        return self.choices

    def scores(self) -> list[Choice]:
        return []

    def logits(self) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([choice.token_id for choice in self.choices]), WORDS).float()


@dataclass
class FakeRunner:
    """Writes its token ids into the pool instead of computing, and counts on; ``before`` is called first.

    ``packs``: rows of many requests share steps of at most ``step_rows`` rows; otherwise prefill comes in pieces alone.
    """

    pool: PagedKVPool
    before: Callable[[], None] = lambda: None
    piece_tokens: int = 64
    runs_ahead: bool = False
    slots: int = 32
    packs: bool = False
    step_rows: int = 48
    computed: list[tuple[tuple[int, ...], tuple[PlacedChunk, ...]]] = field(default_factory=list)
    batches: list[list[StepRows]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    requests: dict[int, SamplingRequest] = field(default_factory=dict)  # by slot
    last: dict[int, int] = field(default_factory=dict)  # the token drawn last, by slot

    def prepare(self) -> None:
        """Nothing is captured here."""

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return not self.packs

    def room(self, *, decoding: bool) -> StepRoom:
        return StepRoom(self.step_rows)

    def open(self, slot: int, request: SamplingRequest) -> None:
        self.requests[slot] = request
        self.last.pop(slot, None)
        if request.generated:
            self.last[slot] = request.generated[-1]

    def bitmasks(self, count: int) -> Bits:
        return np.zeros((count, -(-VOCABULARY // 32)), np.int32)

    def begin(self, batch: Sequence[StepRows]) -> FakeStep:
        self.before()
        self.threads.add(threading.current_thread().name)
        check_batch(batch, self.piece_tokens)
        self.batches.append(list(batch))
        sequences = [rows.sequence for rows in batch]
        plan = plan_step(sequences, plan_levels(sequences, max_cascade_levels=3), page_size=self.pool.page_size)
        ids = [[source if source >= 0 else self.last[~source] for source in rows.sources] for rows in batch]
        for rows, own in zip(batch, ids, strict=True):  # all that is new is in the pool before any of it is read
            self.computed.append((tuple(own), rows.sequence.chunks))
            self._write(rows.sequence, own)
        choices = []
        for rows, own in zip(batch, ids, strict=True):
            for draw in rows.draws:
                token = self.token(dataclasses.replace(rows, draw=draw), own)
                self.last[draw.slot] = token
                choices.append(Choice(token, None))
        return FakeStep(plan, choices)

    def token(self, rows: StepRows, ids: list[int]) -> int:
        """What is drawn behind ``rows``, whose tokens are ``ids``."""
        return ids[-1] + 1

    def _write(self, sequence: StepSequence, ids: Sequence[int]) -> None:
        size = self.pool.page_size
        for at, token in enumerate(ids, start=sequence.tail_tokens):
            slot = sequence.tail_pages[at // size] * size + at % size
            for tensor in (*self.pool.keys, *self.pool.values):
                tensor[slot] = float(token)


def small_pool(pages: int = 16, page_size: int = 4) -> PagedKVPool:
    return PagedKVPool(LAYOUT, pages=pages, chunk_pages=pages, page_size=page_size)
