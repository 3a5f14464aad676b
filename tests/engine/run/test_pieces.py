"""Chunks and tails are cut into the same pieces whatever else runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.kv.pages import PageRun
from engine.plan import PlacedChunk, StepSequence
from engine.run.pieces import prefill_chunk, prefill_chunk_piece, prefill_tail

CONTEXT = (PlacedChunk(0, 5, 0), PlacedChunk(8, 3, 0))


class Runner:
    def __init__(self, piece_tokens: int) -> None:
        self.piece_tokens = piece_tokens
        self.begun: list[tuple[tuple[int, ...], StepSequence, bool]] = []

    def prefill(self, token_ids: Any, sequence: StepSequence, *, logits: bool) -> Any:
        self.begun.append((tuple(token_ids), sequence, logits))
        return self

    def logits(self) -> torch.Tensor:
        return torch.full((1, 3), float(len(self.begun)))


def runner(piece_tokens: int) -> Any:
    return Runner(piece_tokens)


@pytest.mark.parametrize(("size", "cuts"), [(3, [3, 3, 1]), (7, [7]), (100, [7]), (1, [1] * 7)])
def test_a_chunk_is_cut_from_its_beginning(size: int, cuts: list[int]) -> None:
    made = runner(size)
    prefill_chunk(made, range(7), CONTEXT, PageRun(4, 2))
    assert [len(ids) for ids, _, _ in made.begun] == cuts
    assert [token for ids, _, _ in made.begun for token in ids] == list(range(7))
    firsts = [sum(cuts[:index]) for index in range(len(cuts))]
    for first, (ids, sequence, logits) in zip(firsts, made.begun, strict=True):
        assert sequence == StepSequence(CONTEXT, (4, 5), first, len(ids), 8 + first) and not logits


def test_a_tails_last_piece_has_the_logits() -> None:
    made = runner(4)
    found = prefill_tail(made, (1, 2, 3, 4, 5), CONTEXT, [9, 3], start=20)
    assert found.tolist() == [2.0] * 3
    assert [(ids, s.tail_tokens, s.position) for ids, s, _ in made.begun] == [((1, 2, 3, 4), 0, 20), ((5,), 4, 24)]
    assert all(s.tail_pages == (9, 3) and logits for _, s, logits in made.begun)


def test_nothing_is_no_tail_and_moved_context_is_none() -> None:
    with pytest.raises(ValueError, match="token_ids: at least one"):
        prefill_tail(runner(4), (), CONTEXT, [1], start=0)
    with pytest.raises(ValueError, match=r"context: .* at their computed places"):
        prefill_chunk_piece(runner(4), (1,), 0, (PlacedChunk(0, 5, -2),), PageRun(0, 1))
