"""Tails whose rows are computed in steps of any packing, and what of them is compared to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.plan import PlacedChunk, StepSequence
from engine.run.pieces import GREEDY
from engine.run.protocol import PendingStep, StepRows
from engine.sampling.params import Draw
from tests.engine.composer import Composer
from tests.gpu.engine_models import tokens

Context = tuple[PlacedChunk, ...]


@dataclass(frozen=True)
class Tail:
    """Tokens behind a composition, all of them known, and the pages that their KV goes to."""

    context: Context
    token_ids: tuple[int, ...]
    pages: tuple[int, ...]

    @property
    def start(self) -> int:
        return sum(chunk.tokens for chunk in self.context)


@dataclass(frozen=True)
class Slice:
    """``rows`` rows of a tail from ``first`` on; ``draws`` behind the last of them."""

    tail: Tail
    first: int
    rows: int
    draws: bool = True

    @property
    def end(self) -> int:
        return self.first + self.rows

    def step_rows(self, slot: int) -> StepRows:
        tail = self.tail
        sequence = StepSequence(tail.context, tail.pages, self.first, self.rows, tail.start + self.first)
        draw = Draw(slot, self.end, tail.start + self.end) if self.draws else None
        return StepRows(sequence, tail.token_ids[self.first : self.end], draw)


class Packing:
    """Tails over one composer's pool. Slot i is the i-th draw's of each step."""

    def __init__(self, composer: Composer) -> None:
        self.composer, self.runner, self.pool = composer, composer.runner, composer.pool
        for slot in range(self.runner.slots):
            self.runner.open(slot, GREEDY)

    def contexts(self, lengths: Sequence[int]) -> list[Context]:
        """Compositions over chunks of those lengths: none, each mode's whole one, one in another order, one twice."""
        chunks = [tokens(50 + i, length) for i, length in enumerate(lengths)]
        orders = [
            ("exact", chunks),
            ("anchored", chunks),
            ("independent", chunks[::-1]),
            ("independent", chunks[:1] * 2),
        ]
        return [(), *(self.composer.hold(list(order), mode)[1] for mode, order in orders)]

    def tail(self, context: Context, count: int, seed: int) -> Tail:
        pages = self.pool.allocate_pages(self.pool.pages_for(count))
        assert pages is not None
        return Tail(context, tuple(tokens(seed, count)), tuple(pages))

    def wipe(self, tails: Iterable[Tail]) -> None:
        """Nothing of the tails is left: what is read before it is written shows."""
        for tail in tails:
            for tensor in (*self.pool.keys, *self.pool.values):
                tensor[self._slots(tail, 0, len(tail.pages) * self.pool.page_size)] = float("nan")

    def kv(self, tail: Tail, first: int = 0) -> Tensor:
        """Keys and values of the tail's tokens from ``first`` on, of all layers, in one line."""
        slots = self._slots(tail, first, len(tail.token_ids))
        return torch.cat([tensor[slots].reshape(-1) for tensor in (*self.pool.keys, *self.pool.values)])

    def begin(self, slices: Sequence[Slice]) -> PendingStep:
        rows, draws = [], 0
        for part in slices:
            rows.append(part.step_rows(draws))
            draws += part.draws
        return self.runner.begin(rows)

    def by_decoding(self, tail: Tail) -> list[Tensor]:
        """Each row alone in a step: the logits behind every token."""
        return [self.begin([Slice(tail, at, 1)]).logits()[0] for at in range(len(tail.token_ids))]

    def packed(self, tails: Sequence[Tail], rng: random.Random, *, most: int = 120) -> dict[tuple[int, int], Tensor]:
        """All rows of all tails in random steps: (tail, tokens so far) -> logits behind each slice that drew."""
        at = [0] * len(tails)
        logits: dict[tuple[int, int], Tensor] = {}
        while left := [i for i, tail in enumerate(tails) if at[i] < len(tail.token_ids)]:
            room = self.runner.room(decoding=rng.random() < 0.5)
            slices: list[Slice] = []
            members: list[tuple[int, int]] = []
            for i in rng.sample(left, rng.randint(1, len(left))):
                tail, wanted = tails[i], rng.choice((1, 1, rng.randint(1, most)))
                wanted = min(wanted, len(tail.token_ids) - at[i])
                rows = room.take([chunk.tokens for chunk in tail.context], at[i], wanted)
                if rows:
                    slices.append(
                        Slice(tail, at[i], rows, draws=len(members) < self.runner.slots and rng.random() < 0.7)
                    )
                    at[i] += rows
                    members += [(i, at[i])] if slices[-1].draws else []
            step = self.begin(slices)
            if members:
                logits.update(zip(members, step.logits(), strict=True))
        return logits

    def _slots(self, tail: Tail, first: int, end: int) -> Tensor:
        size = self.pool.page_size
        slots = [tail.pages[i // size] * size + i % size for i in range(first, end)]
        return torch.tensor(slots, device=self.pool.device)
