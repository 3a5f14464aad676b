"""Random plans over a pool whose unused slots are NaN, and float64 attention over them, one row at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.plan import CascadePlan, StepSequence, behind_each_other, plan_levels, plan_step

PAGE = 16
CHUNK_TOKENS = (1, 15, 16, 17, 100, 1000, 2500, 5000)


@dataclass(frozen=True)
class Sequences:
    """Sequences of a step and the slots of the pool they live in."""

    sequences: tuple[StepSequence, ...]
    slots: int

    def plan(self, *only: int) -> CascadePlan:
        """The plan of all sequences, or of some of them."""
        members = [self.sequences[i] for i in only] if only else list(self.sequences)
        return plan_step(members, plan_levels(members, max_cascade_levels=3), page_size=PAGE)

    def used_slots(self) -> list[int]:
        used: set[int] = set()
        for sequence in self.sequences:
            for chunk in sequence.chunks:
                used.update(range(chunk.first_slot, chunk.first_slot + chunk.tokens))
            for at in range(sequence.tail_tokens + sequence.rows):
                used.add(sequence.tail_pages[at // PAGE] * PAGE + at % PAGE)
        return sorted(used)


def random_sequences(
    seed: int, count: int, *, rows: tuple[int, ...] = (1,), chunk_tokens: tuple[int, ...] = CHUNK_TOKENS
) -> Sequences:
    """``count`` sequences over shared chunks at any offset, some chunk twice in a row; tails of 1 to 300 tokens."""
    rng = random.Random(seed)
    pages, places = 1, []
    for tokens in chunk_tokens:
        places.append((pages * PAGE, tokens))
        pages += -(-tokens // PAGE)
    free = list(range(pages, pages + 24 * count))
    rng.shuffle(free)
    sequences = []
    for _ in range(count):
        wanted = rng.choices(places, k=rng.randint(0, 4)) if rng.random() < 0.5 else places[-1:] + places[:1]
        chunks = behind_each_other((slot, tokens, rng.choice((0, 0, 7, 480))) for slot, tokens in wanted)
        new = rng.choice(rows)
        before = rng.randint(0, 300 - new)
        own = tuple(free.pop() for _ in range(-(-(before + new) // PAGE)))
        sequences.append(StepSequence(chunks, own, before, new, sum(c.tokens for c in chunks) + 480 + before))
    return Sequences(tuple(sequences), (pages + 24 * count) * PAGE)


def frequencies(dim: int) -> Tensor:
    return 1e4 ** (-torch.arange(0, dim // 2, dtype=torch.float64) / (dim // 2))


def turned(x: Tensor, angles: Tensor, dim: int) -> Tensor:
    """x (rows, heads, dim) turned to positions ``angles`` (rows,), in float64."""
    at = angles.double()[:, None, None] * frequencies(dim).to(x.device)
    a, b = x.double().chunk(2, -1)
    return torch.cat((a * at.cos() - b * at.sin(), b * at.cos() + a * at.sin()), -1)


def attention_of(plan: CascadePlan, keys: Tensor, values: Tensor, q: Tensor, *, turn: bool, scaling: float) -> Tensor:
    """(rows, heads, dim) float64: each row over its chunks and its tail, its raw query turned for each of them."""
    outs = []
    for row, position in enumerate(plan.positions):
        pairs = [
            (part, read, offset)
            for read in plan.reads
            for r, offset, part in zip(read.rows, read.offsets, read.places, strict=True)
            if r == row
        ]
        (tail,) = (t for t in plan.tails if t.first_row <= row < t.first_row + t.rows)
        seen = range(tail.tokens_before + row - tail.first_row + 1)
        places = [(range(read.first_slot, read.first_slot + read.tokens), offset) for _, read, offset in sorted(
            pairs, key=lambda pair: pair[0])]  # fmt: skip
        places.append(([tail.pages[i // PAGE] * PAGE + i % PAGE for i in seen], 0))  # type: ignore[arg-type]
        scores, vectors = [], []
        for slots, offset in places:
            index = torch.tensor(list(slots), device=q.device)
            x = q[row : row + 1]
            x = turned(x, torch.tensor([position - offset], device=q.device), q.shape[-1]) if turn else x.double()
            x = x.view(keys.shape[1], -1, q.shape[-1])
            scores.append(torch.einsum("ghd,ngd->ghn", x, keys[index].double()) * scaling)
            vectors.append(values[index].double())
        weights = torch.cat(scores, -1).softmax(-1)
        outs.append(torch.einsum("ghn,ngd->ghd", weights, torch.cat(vectors)).reshape(q.shape[1:]))
    return torch.stack(outs)
