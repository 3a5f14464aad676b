"""The forwards of the start check: two sequences over shared chunks, ours and the model's own eager attention.

The second sequence has some of the first one's chunks at other places, and both decode in one batch, so that
compositions, pieces, shared reads, moved chunks, merges and tails are all in it. Windows that are longer than these
few tokens are at work in sequences that stand with a gap in them, at positions so far apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from chunk_store.key import ModelIdentity
from chunk_store.layout import KVLayout
from engine.block_mask import MaskedSequence, masked_sequence
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.model.borrowed import BorrowedModel
from engine.plan import PlacedChunk, StepSequence, Window
from engine.reuse import ReuseMode, key_composition
from engine.run.pieces import cuts, prefill_tail, tail_rows
from engine.run.protocol import Runner, StepRows, WatchableRunner
from engine.sampling.params import Draw

PIECE_TOKENS = 12  # of the runner to check with
PAGE_SIZE = 16
CHUNK_TOKENS = (5, 18, 1, 16, 9)
QUERY_TOKENS = 8
CHECK_TOKENS = sum(CHUNK_TOKENS) + QUERY_TOKENS
CHUNK_TOKENS_FEW = (2, 7, 1, 4)  # where a forward of a large model costs seconds
STEPS = 6  # of them decoded, one at a time

RunnerFactory = Callable[[PagedKVPool], WatchableRunner]


@dataclass(frozen=True)
class CheckPrompt:
    """A sequence to check: chunks, a query, and how many of the query's tokens are decoded one at a time.

    Chunks and query stand at ``starts``; the first chunk at position 0.
    """

    chunks: tuple[tuple[int, ...], ...]
    query: tuple[int, ...]
    steps: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, chunks: tuple[tuple[int, ...], ...], query: tuple[int, ...], steps: int) -> CheckPrompt:
        """One without gaps."""
        return cls(chunks, query, steps, (0, *accumulate(map(len, chunks))))

    @property
    def start(self) -> int:
        return self.starts[-1]

    @property
    def lengths(self) -> list[int]:
        return [*map(len, self.chunks), len(self.query)]

    @property
    def tokens(self) -> Tensor:
        """The whole prompt, int64."""
        return torch.tensor([token for chunk in self.chunks for token in chunk] + list(self.query))


Prompts = tuple[CheckPrompt, ...]


def check_prompts(
    vocabulary: int, limit: int, chunk_tokens: Sequence[int] = CHUNK_TOKENS, *, seed: int = 20
) -> Prompts:
    """Two prompts of at most ``limit`` tokens (at least 4), of chunks of ``chunk_tokens`` or in that proportion."""
    total = sum(chunk_tokens)
    query = QUERY_TOKENS if total + QUERY_TOKENS <= limit else max(2, limit // 4)
    room = min(limit - query, total)
    sizes = [size for size in (n * room // total for n in chunk_tokens) if size]
    if len(sizes) < 2:
        sizes = [1] * min(room, 2)
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (count,), generator=generator).tolist())

    chunks = tuple(draw(size) for size in sizes)
    picked = [chunks[i] for i in (0, 3, 1) if i < len(chunks)]
    steps = min(STEPS, query - 1)
    return CheckPrompt.of(chunks, draw(query), steps), CheckPrompt.of(tuple(picked), draw(query), steps)


def window_prompts(
    vocabulary: int, limit: int, windows: Iterable[Window | None], *, seed: int = 20
) -> list[CheckPrompt]:
    """For each window whose border prompts without gaps do not reach one that it cuts in a chunk's middle.

    The first rows of its query see a sliding window's last tokens from there on; a block ends there. Windows whose
    border lies so near to ``limit`` that no prompt fits are left out.
    """
    plain, _ = check_prompts(vocabulary, CHECK_TOKENS, seed=seed)
    prompts = []
    for window in dict.fromkeys(windows):
        if window is None:
            continue
        anchor, cut, *others = map(len, plain.chunks)
        first = window.tokens - cut // 2 if window.chunked else anchor
        rest = first + cut if window.chunked else first + cut // 2 + window.tokens - sum(others)
        if first < anchor or rest < first + cut or rest + sum(others) + len(plain.query) > limit:
            continue
        starts = (0, first, *accumulate(others, initial=rest))
        prompts.append(replace(plain, starts=starts))
    return prompts


@torch.inference_mode()
def our_logits(
    layout: KVLayout, device: torch.device, make_runner: RunnerFactory, mode: ReuseMode, prompts: Prompts
) -> Tensor:
    """Our logits (rows, vocabulary), prompt by prompt: of its last prefilled token and of its decode steps."""
    pages = [sum(-(-len(chunk) // PAGE_SIZE) for chunk in prompt.chunks) for prompt in prompts]
    tail_pages = -(-QUERY_TOKENS // PAGE_SIZE)
    pool = PagedKVPool(
        layout, pages=sum(pages) + tail_pages * len(prompts), chunk_pages=sum(pages), page_size=PAGE_SIZE, device=device
    )
    runner, residents = make_runner(pool), ResidentChunks(pool)
    placed = [_place(runner, residents, prompt, mode) for prompt in prompts]
    tails = [tuple(pool.allocate_pages(tail_pages) or ()) for _ in prompts]
    rows: list[list[Tensor]] = []
    for slot, (prompt, chunks, pages_of) in enumerate(zip(prompts, placed, tails, strict=True)):
        prefilled = prompt.query[: len(prompt.query) - prompt.steps]
        rows.append([prefill_tail(runner, prefilled, chunks, pages_of, start=prompt.start, slot=slot)])
    for step in range(prompts[0].steps):
        at = len(prompts[0].query) - prompts[0].steps + step
        batch = [
            StepRows(
                StepSequence(chunks, pages_of, at, 1, prompt.start + at),
                prompt.query[at : at + 1],
                Draw(slot, step + 1, prompt.start + at + 1),
            )
            for slot, (prompt, chunks, pages_of) in enumerate(zip(prompts, placed, tails, strict=True))
        ]
        for own, row in zip(rows, runner.begin(batch).logits(), strict=True):
            own.append(row)
    return torch.stack([row for own in rows for row in own])


def _place(runner: Runner, residents: ResidentChunks, prompt: CheckPrompt, mode: ReuseMode) -> tuple[PlacedChunk, ...]:
    """The prompt's chunks in the pool, computed where they are not there yet."""
    placed: list[PlacedChunk] = []
    keyed = key_composition(ModelIdentity("self-check"), prompt.chunks, mode)
    for chunk, start in zip(keyed, prompt.starts, strict=False):
        # EXACT computes a chunk where it stands, the modes that move it directly behind its context.
        computed = start if mode is ReuseMode.EXACT else chunk.computed_start
        resident = residents.find(chunk.key) or residents.reserve(chunk.key, len(chunk.token_ids))
        if not resident.ready:
            context = [replace(placed[i], offset=0) for i in chunk.context]
            pages = tuple(range(resident.run.first, resident.run.first + resident.run.pages))
            for cut in cuts(runner, context, len(chunk.token_ids), chunk=True):
                runner.begin([tail_rows(chunk.token_ids, cut, context, pages, start=computed)])
            resident.ready = True
        placed.append(PlacedChunk(resident.first_slot(PAGE_SIZE), len(chunk.token_ids), start - computed, start))
    return tuple(placed)


def eager_logits(borrowed: BorrowedModel, modes: Sequence[ReuseMode], prompts: Prompts, limit: int) -> list[Tensor]:
    """For each mode the same rows from the model's own eager attention under the mode's mask.

    Sequences that do not see each other share a forward, as far as it has at most ``limit`` rows.
    """
    packs: list[list[tuple[CheckPrompt, MaskedSequence]]] = [[]]
    for mode in modes:
        for prompt in prompts:
            plain = masked_sequence(prompt.lengths, mode, prompt.starts)
            if packs[-1] and sum(len(p.source) for _, p in packs[-1]) + len(plain.source) > limit:
                packs.append([])
            packs[-1].append((prompt, plain))
    rows = [part for pack in packs for part in _eager_pack(borrowed, pack)]
    each = len(prompts)
    return [torch.cat(rows[i * each : (i + 1) * each]) for i in range(len(modes))]


def _eager_pack(borrowed: BorrowedModel, pack: list[tuple[CheckPrompt, MaskedSequence]]) -> list[Tensor]:
    device = borrowed.device
    ids = torch.cat([prompt.tokens[plain.source] for prompt, plain in pack])
    positions = torch.cat([plain.positions for _, plain in pack])
    allowed = _block_diagonal([plain.allowed for _, plain in pack])
    ends = accumulate(len(plain.source) for _, plain in pack)
    counts = [prompt.steps + 1 for prompt, _ in pack]
    wanted = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    logits = borrowed.eager_forward(ids.to(device), positions.to(device), allowed, wanted.to(device))
    return [logits[end - count : end] for end, count in zip(accumulate(counts), counts, strict=True)]


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    whole = torch.zeros([sum(len(block) for block in blocks)] * 2, dtype=torch.bool)
    at = 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


def plain_logits(borrowed: BorrowedModel, prompts: Prompts) -> Tensor:
    """The same rows from the model as it is, without a mask or positions of ours: what EXACT has to equal."""
    rows = []
    for prompt in prompts:
        last = torch.arange(len(prompt.tokens) - prompt.steps - 1, len(prompt.tokens), device=borrowed.device)
        rows.append(borrowed.eager_forward(prompt.tokens.to(borrowed.device), logit_rows=last))
    return torch.cat(rows)
