"""At start: does every reuse mode give what the model's own eager attention gives under the mode's mask?

A mode that does not is refused for the model, with the reason; a model for which EXACT does not hold is
refused. The check runs a short random prompt in a small pool of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chunk_store.key import ModelIdentity
from engine.model import BorrowedModel, ModelRefused
from engine.plan import PlacedChunk, StepSequence
from engine.pool import PagedKVPool
from engine.probe import Findings
from engine.resident import ResidentChunks
from engine.reuse import ReuseMode, key_composition, masked_sequence
from engine.runner import ModelRunner

PIECE_TOKENS = 12  # of the runner to check with
CHUNK_TOKENS = (5, 18, 1, 16, 9)
QUERY_TOKENS = 7
# Largest difference of logits, relative to their standard deviation over the vocabulary.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}

RunnerFactory = Callable[[PagedKVPool], ModelRunner]


def check_modes(borrowed: BorrowedModel, findings: Findings, make_runner: RunnerFactory) -> dict[ReuseMode, str]:
    """For each mode "" if it holds, otherwise why it is refused. Raises ``ModelRefused`` if EXACT fails."""
    refusals: dict[ReuseMode, str] = {}
    for mode in ReuseMode:
        if mode is not ReuseMode.EXACT and findings.rotation_refusal:
            refusals[mode] = f"chunks of this model cannot be moved: {findings.rotation_refusal}"
            continue
        error = mode_error(borrowed, findings, make_runner, mode)
        tolerance = TOLERANCE[findings.layout.dtype]
        holds = error <= tolerance  # False for NaN too
        refusals[mode] = "" if holds else f"logits differ from eager attention by {error:.2g} standard deviations"
    if refusals[ReuseMode.EXACT]:
        raise ModelRefused(f"model {borrowed.name} cannot be served exactly: {refusals[ReuseMode.EXACT]}")
    return refusals


@torch.inference_mode()
def mode_error(borrowed: BorrowedModel, findings: Findings, make_runner: RunnerFactory, mode: ReuseMode) -> float:
    """Largest difference of two steps' logits from eager attention, in standard deviations of the logits."""
    vocabulary = borrowed.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(20)
    limit = findings.context_length_max - QUERY_TOKENS - 1
    chunks = [tuple(_random_tokens(n, vocabulary, generator)) for n in CHUNK_TOKENS if sum(CHUNK_TOKENS) <= limit]
    query = _random_tokens(QUERY_TOKENS + 1, vocabulary, generator)
    ours = _two_steps(borrowed, findings, make_runner, mode, chunks, query)
    tokens = torch.tensor([t for chunk in chunks for t in chunk] + query, device=borrowed.device)
    plain = masked_sequence([*map(len, chunks), len(query)], mode)
    theirs = borrowed.eager_forward(tokens[plain.source], plain.positions.to(tokens.device), plain.allowed)[-2:]
    difference = (ours - theirs).abs().max()
    return float(difference / theirs.std(dim=-1).mean())


def _random_tokens(count: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    return torch.randint(0, vocabulary, (count,), generator=generator).tolist()


def _two_steps(
    borrowed: BorrowedModel,
    findings: Findings,
    make_runner: RunnerFactory,
    mode: ReuseMode,
    chunks: list[tuple[int, ...]],
    query: list[int],
) -> Tensor:
    """Our logits of the query's last prompt token and of one decode step beside a second sequence."""
    page_size = 16
    pages = sum(-(-len(chunk) // page_size) for chunk in chunks)
    pool = PagedKVPool(findings.layout, pages=pages + 6, chunk_pages=pages, page_size=page_size, device=borrowed.device)
    runner = make_runner(pool)
    residents = ResidentChunks(pool)
    placed: list[PlacedChunk] = []
    keyed = key_composition(ModelIdentity("self-check"), chunks, mode)
    for chunk in keyed:
        resident = residents.find(chunk.key) or residents.reserve(chunk.key, len(chunk.token_ids))
        if not resident.ready:
            context = [PlacedChunk(placed[i].first_slot, placed[i].tokens, 0) for i in chunk.context]
            runner.prefill_chunk(chunk.token_ids, context, resident.run)
            resident.ready = True
        placed.append(PlacedChunk(resident.first_slot(page_size), len(chunk.token_ids), chunk.offset))
    start = sum(map(len, chunks))
    tails = [pool.allocate_pages(3) or [] for _ in range(2)]
    last = runner.prefill_tail(query[:-1], placed, tails[0], start=start)
    runner.prefill_tail(query[:1], placed[:1], tails[1], start=len(chunks[0]))
    steps = [
        StepSequence(tuple(placed), tuple(tails[0]), len(query) - 1, 1, start + len(query) - 1),
        StepSequence(tuple(placed[:1]), tuple(tails[1]), 1, 1, len(chunks[0]) + 1),
    ]
    logits, _ = runner.decode([query[-1], query[0]], steps)
    return torch.stack([last, logits[0]])
