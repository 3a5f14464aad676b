"""The plain forward that a mode stands for: tokens, positions and who sees whom, by definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_mask import masked_sequence
from engine.reuse import ReuseMode, context_indices

lengths_of = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_of)
def test_exact_is_the_plain_causal_forward(lengths: list[int]) -> None:
    sequence, total = masked_sequence(lengths, ReuseMode.EXACT), sum(lengths)
    assert sequence.source.tolist() == sequence.positions.tolist() == list(range(total))
    assert torch.equal(sequence.allowed, torch.ones(total, total).tril().bool())


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_of, mode=st.sampled_from(ReuseMode))
def test_each_token_sees_its_context_at_the_distance_of_its_computation(lengths: list[int], mode: ReuseMode) -> None:
    sequence = masked_sequence(lengths, mode)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    rows = {}  # of a chunk's own tokens: those that stand where the composition has them
    for row, (source, position) in enumerate(zip(sequence.source.tolist(), sequence.positions.tolist(), strict=True)):
        if source == position:
            rows[source] = row
    assert sorted(rows) == list(range(sum(lengths)))
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        last = index == len(lengths) - 1
        context = list(range(index)) if last else list(context_indices(mode, index))
        behind = sum(lengths[i] for i in context)
        for token in range(start, start + length):
            seen = sequence.allowed[rows[token]].nonzero().flatten().tolist()
            sources = sorted(sequence.source[seen].tolist())
            own = list(range(start, token + 1))
            assert sources == sorted([t for i in context for t in range(starts[i], starts[i] + lengths[i])] + own)
            if not last:
                distances = sorted(token - sequence.positions[row].item() for row in seen)
                assert distances == list(range(token - start + behind + 1)), "as if nothing stood between"


@pytest.mark.parametrize(("mode", "rows"), [(ReuseMode.EXACT, 9), (ReuseMode.INDEPENDENT, 9), (ReuseMode.ANCHORED, 11)])
def test_an_anchored_chunk_further_on_has_a_copy_of_the_anchor(mode: ReuseMode, rows: int) -> None:
    assert len(masked_sequence([2, 3, 3, 1], mode).source) == rows


@pytest.mark.parametrize("mode", ReuseMode)
def test_parts_may_stand_with_gaps_between_them(mode: ReuseMode) -> None:
    """A part stands where it is told to; a copy of the anchor directly before each chunk that was moved."""
    apart = masked_sequence([2, 3, 3, 1], mode, (0, 10, 50, 90))
    copies = ([8, 9], [48, 49]) if mode is ReuseMode.ANCHORED else ([], [])
    assert apart.positions.tolist() == [0, 1, *copies[0], 10, 11, 12, *copies[1], 50, 51, 52, 90]
    seen = apart.allowed[-2].nonzero().flatten()  # by the last token of the last chunk
    context = {ReuseMode.EXACT: [0, 1, 10, 11, 12], ReuseMode.ANCHORED: [48, 49]}.get(mode, [])
    assert apart.positions[seen].tolist() == [*context, 50, 51, 52]
