"""Random plans over a pool whose unused slots are NaN, and float64 attention over them, one row at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.rotary import Rotation
from engine.plan import CascadePlan, StepSequence, Window, behind_each_other, plan_levels, plan_step
from engine.run.cuda.cascade.launch import CascadeWork
from engine.run.cuda.cascade.records import Limits
from engine.run.cuda.cascade.tuning import AttentionShape, RotationTable, Tuning

PAGE = 16
LIMITS = Limits(rows=512, pairs=2048, items=8192, pages=65536, partials=8192)
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


def turned(x: Tensor, angles: Tensor, rotation: Rotation) -> Tensor:
    """x (rows, heads, dim) turned to positions ``angles`` (rows,), in float64."""
    at = angles.double()[:, None, None] * rotation.inv_freq.to(x.device)
    first, pairs = rotation.first_dim, len(rotation.inv_freq)
    own = x.double()[..., first : first + 2 * pairs]
    a, b = (own[..., ::2], own[..., 1::2]) if rotation.interleaved else (own[..., :pairs], own[..., pairs:])
    made = a * at.cos() - b * at.sin(), b * at.cos() + a * at.sin()
    own = torch.stack(made, -1).flatten(-2) if rotation.interleaved else torch.cat(made, -1)
    return torch.cat((x[..., :first].double(), own, x[..., first + 2 * pairs :].double()), -1)


@dataclass(frozen=True)
class Form:
    """What a layer's attention is: heads, widths, how it turns, what it lets rows see, how it makes weights."""

    ratio: int = 4
    k_dim: int = 128
    v_dim: int = 128
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    first_dim: int = 0
    pairs: int = 0  # that turn; 0: all that there can be
    interleaved: bool = False
    window: Window | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def rotation(self) -> Rotation:
        pairs = self.pairs or (self.k_dim - self.first_dim) // 2
        return Rotation(frequencies(2 * pairs), self.interleaved, self.first_dim)

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.kv_heads * self.ratio, self.kv_heads, self.k_dim, self.dtype, PAGE, self.v_dim)


class Setting:
    """A pool of NaN but for the slots in use, raw queries, and launches over them. Without ``fill``, of zeros."""

    def __init__(
        self, sequences: Sequences, form: Form, device: str = "cuda", limits: Limits = LIMITS, *, fill: bool = True
    ) -> None:
        self.sequences, self.form, self.device, self.limits = sequences, form, device, limits
        torch.manual_seed(0)
        used = torch.tensor(sequences.used_slots() if fill else [], dtype=torch.long, device=device)
        self.fill = float("nan") if fill else 0.0
        self.keys, self.values = (self._pool(used, width) for width in (form.k_dim, form.v_dim))
        self.table = RotationTable.of(form.rotation, 16384, device)
        rows, heads = sum(s.rows for s in sequences.sequences), form.kv_heads * form.ratio
        self.q = torch.randn(rows, heads, form.k_dim, device=device).to(form.dtype)
        self.scaling = form.k_dim**-0.5
        self.sinks = torch.randn(heads, device=device) + 3 if form.sinks else None

    def _pool(self, used: Tensor, width: int) -> Tensor:
        shape, dtype = (self.sequences.slots, self.form.kv_heads, width), self.form.dtype
        pool = torch.full(shape, self.fill, dtype=dtype, device=self.device)
        pool[used] = torch.randn(len(used), *shape[1:], device=self.device).to(dtype)
        return pool

    def forget(self, slots: list[int]) -> None:
        """NaN in slots that nobody sees any more."""
        for pool in (self.keys, self.values):
            pool[slots] = float("nan")

    def work(self, tuning: Tuning | None = None) -> CascadeWork:
        work = CascadeWork(self.form.shape, self.device, self.limits, tuning, window=self.form.window)
        work.partials.out.fill_(float("nan"))
        work.partials.lse.fill_(float("nan"))
        return work

    def launch(self, work: CascadeWork, q: Tensor, out: Tensor, *, turn: str = "raw") -> None:
        table = None if turn == "none" else self.table
        work.launch(
            self.keys, self.values, q, out, scaling=self.scaling, rotation=table, turned=turn == "back",
            softcap=self.form.softcap, sinks=self.sinks,
        )  # fmt: skip

    def attend(self, work: CascadeWork, plan: CascadePlan, q: Tensor, *, turn: str = "raw") -> Tensor:
        work.update(plan)
        out = torch.full((*q.shape[:2], self.form.v_dim), float("nan"), dtype=q.dtype, device=self.device)
        self.launch(work, q, out, turn=turn)
        return out

    def standing(self, plan: CascadePlan) -> Tensor:
        """The queries turned to their positions."""
        return turned(self.q, torch.tensor(plan.positions, device=self.device), self.form.rotation).to(self.q.dtype)

    def expected(self, plan: CascadePlan, q: Tensor, *, turn: bool = True) -> Tensor:
        return attention_of(plan, self, q, turn=turn)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def attention_of(plan: CascadePlan, setting: Setting, q: Tensor, *, turn: bool) -> Tensor:
    """(rows, heads, v_dim) float64: each row over what it sees of its chunks and its tail, its raw query turned for
    each of them."""
    form, outs = setting.form, []
    for row, position in enumerate(plan.positions):
        pairs = [
            (part, read, offset, start)
            for read in plan.reads
            for r, offset, part, start in zip(read.rows, read.offsets, read.places, read.starts, strict=True)
            if r == row
        ]
        (tail,) = (t for t in plan.tails if t.first_row <= row < t.first_row + t.rows)
        own = tail.tokens_before + row - tail.first_row
        places = [
            (range(read.first_slot, read.first_slot + read.tokens), offset, start)
            for _, read, offset, start in sorted(pairs, key=lambda pair: pair[0])
        ]
        seen = [tail.pages[i // PAGE] * PAGE + i % PAGE for i in range(own + 1)]
        places.append((seen, 0, position - own))  # type: ignore[arg-type]
        first = 0 if form.window is None else form.window.first(position)
        scores, vectors = [], []
        for slots, offset, start in places:
            index = torch.tensor(list(slots)[max(0, first - start) :], dtype=torch.long, device=q.device)
            x = q[row : row + 1]
            x = turned(x, torch.tensor([position - offset], device=q.device), form.rotation) if turn else x.double()
            x = x.view(form.kv_heads, -1, form.k_dim)
            scores.append(torch.einsum("ghd,ngd->ghn", x, setting.keys[index].double()) * setting.scaling)
            vectors.append(setting.values[index].double())
        all_scores = torch.cat(scores, -1)
        if form.softcap is not None:
            all_scores = form.softcap * torch.tanh(all_scores / form.softcap)
        if setting.sinks is not None:
            all_scores = torch.cat((all_scores, setting.sinks.double().view(form.kv_heads, -1, 1)), -1)
            vectors.append(torch.zeros(1, form.kv_heads, form.v_dim, dtype=torch.float64, device=q.device))
        outs.append(torch.einsum("ghn,ngd->ghd", all_scores.softmax(-1), torch.cat(vectors)).flatten(0, 1))
    return torch.stack(outs)
