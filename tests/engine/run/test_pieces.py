"""Chunks and tails are cut as the runner says: in the same pieces whatever else runs, or in slices as there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine.kv.pages import PageRun
from engine.plan import PlacedChunk, StepSequence
from engine.run.pieces import GREEDY, Cut, chunk_rows, cuts, prefill_chunk, prefill_tail
from engine.run.protocol import StepRows
from engine.run.room import StepRoom
from engine.sampling.params import Draw, SamplingRequest

CONTEXT = (PlacedChunk(0, 5, 0, 0), PlacedChunk(8, 3, 0, 5))


class Runner:
    """Chunks of more than ``long`` tokens are alone."""

    def __init__(self, piece_tokens: int, *, long: int = 0, step_rows: int = 4) -> None:
        self.piece_tokens = piece_tokens
        self.long = long
        self.step_rows = step_rows
        self.opened: list[tuple[int, SamplingRequest]] = []
        self.begun: list[StepRows] = []

    def alone(self, tokens: int, *, chunk: bool) -> bool:
        return tokens > self.long

    def room(self, *, decoding: bool) -> StepRoom:
        assert not decoding
        return StepRoom(self.step_rows)

    def open(self, slot: int, request: SamplingRequest) -> None:
        self.opened.append((slot, request))

    def begin(self, batch: Sequence[StepRows]) -> Any:
        self.begun += batch
        return self

    def logits(self) -> torch.Tensor:
        return torch.full((1, 3), float(len(self.begun)))


def runner(piece_tokens: int, **options: int) -> Any:
    return Runner(piece_tokens, **options)


@pytest.mark.parametrize(
    ("made", "lengths", "alone"),
    [
        *((runner(3), [3, 3, 1], True), (runner(7), [7], True), (runner(100), [7], True), (runner(1), [1] * 7, True)),
        *((runner(3, long=7), [4, 3], False), (runner(3, long=7, step_rows=9), [7], False)),
    ],
)
def test_a_chunk_is_cut_from_its_beginning(made: Any, lengths: list[int], alone: bool) -> None:
    prefill_chunk(made, range(7), CONTEXT, PageRun(4, 2))
    assert [len(rows.sources) for rows in made.begun] == lengths
    assert [token for rows in made.begun for token in rows.sources] == list(range(7))
    firsts = [sum(lengths[:index]) for index in range(len(lengths))]
    assert list(cuts(made, CONTEXT, 7, chunk=True)) == [Cut(*cut, alone) for cut in zip(firsts, lengths, strict=True)]
    for first, rows in zip(firsts, made.begun, strict=True):
        assert rows.sequence == StepSequence(CONTEXT, (4, 5), first, len(rows.sources), 8 + first)
        assert rows.draw is None and rows.alone == alone


@pytest.mark.parametrize("long", [0, 9])
def test_behind_a_tails_last_rows_a_token_is_drawn(long: int) -> None:
    made = runner(4, long=long)
    found = prefill_tail(made, (1, 2, 3, 4, 5), CONTEXT, [9, 3], start=20, slot=6)
    assert found.tolist() == [2.0] * 3
    placed = [(rows.sources, rows.sequence.tail_tokens, rows.sequence.position) for rows in made.begun]
    assert placed == [((1, 2, 3, 4), 0, 20), ((5,), 4, 24)]
    assert [rows.draw for rows in made.begun] == [None, Draw(6, 0, 25)] and made.opened == [(6, GREEDY)]
    assert all(rows.sequence.tail_pages == (9, 3) and rows.alone == (not long) for rows in made.begun)


def test_nothing_is_no_tail_and_moved_context_is_none() -> None:
    with pytest.raises(ValueError, match="token_ids: at least one"):
        prefill_tail(runner(4), (), CONTEXT, [1], start=0)
    with pytest.raises(ValueError, match=r"context: .* at their computed places"):
        chunk_rows((1,), Cut(0, 1, True), (PlacedChunk(0, 5, -2, 0),), PageRun(0, 1))
