"""Windows are found in mask functions alone, at any length, and nothing is taken for a window that is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from engine.model.borrowed import LayerMask, ModelRefused
from engine.model.limits import ContextLimit
from engine.model.masks import MaskFunction
from engine.model.windows import Windows, cap_by_blocks, find_windows
from engine.plan import Window

CPU = torch.device("cpu")
LIMIT = ContextLimit(100, 100)
PADDING = torch.zeros(1, dtype=torch.int64)


def find(*layers: tuple[MaskFunction | None, int | None], limit: ContextLimit = LIMIT) -> Windows:
    return find_windows([LayerMask(*layer) for layer in layers], limit, "m", CPU)


def mask(shown: Callable[[Tensor, Tensor], Any]) -> MaskFunction:
    return lambda batch, head, query, key: shown(query, key)


def of(window: Window) -> Any:
    if window.chunked:
        return chunked_causal_mask_function(window.tokens, PADDING)
    return sliding_window_causal_mask_function(window.tokens)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 4096, 100_000, 131_070, 131_071])
def test_the_librarys_masks_are_seen_up_to_the_full_context(tokens: int, chunked: bool) -> None:
    window, limit = Window(tokens, chunked and tokens > 1), ContextLimit(131_072, 131_072)
    found = find((of(window), None), (causal_mask_function, None), limit=limit)
    assert found == Windows((window, None), limit)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(2, 130), chunked=st.booleans(), length=st.integers(5, 120))
def test_any_window_at_any_length(tokens: int, chunked: bool, length: int) -> None:
    limit = ContextLimit(length, length)
    window = Window(tokens, chunked)
    found = find((of(window), None), limit=limit)
    assert found.limit == limit
    (seen,) = found.layers
    for query in range(length):
        assert (0 if seen is None else seen.first(query)) == window.first(query)


def test_a_window_that_hides_nothing_is_none() -> None:
    assert find((of(Window(100)), 100), (of(Window(4096)), 4096), (None, None)) == Windows((None,) * 3, LIMIT)


def test_layers_have_the_windows_of_the_masks_they_are_given() -> None:
    sliding, blocks = of(Window(40)), of(Window(30, chunked=True))
    found = find((sliding, 40), (causal_mask_function, None), (blocks, None), (sliding, None))
    assert found == Windows((Window(40), None, Window(30, chunked=True), Window(40)), LIMIT)


def test_a_layer_that_asks_for_another_window_than_its_mask_has_caps_the_context() -> None:
    for function, asked, at in ((causal_mask_function, 30, 30), (of(Window(40)), 50, 40), (None, 20, 20)):
        limit = find((function, asked)).limit
        assert limit.tokens == at and f"asks for a sliding window of {asked} tokens" in limit.because


def test_masks_that_are_no_windows_cap_the_context_where_they_begin_to_hide() -> None:
    far = find((mask(lambda q, k: (k <= q) & ((q - k < 40) | (k % 7 == 3))), None))
    assert far.layers == (None,) and far.limit.tokens == 40 and "40 or more back, and is no window" in far.limit.because
    near = find((mask(lambda q, k: (k <= q) & ((k == 0) | (q < 63))), None))
    assert near.limit.tokens <= 64 and "from position" in near.limit.because
    growing = find((mask(lambda q, k: (k <= q) & (q - k < torch.where(q < 80, 40, 41))), None))
    assert growing.layers == (None,) and growing.limit.tokens == 40


@pytest.mark.parametrize("shown", [lambda q, k: k <= q + 1, lambda q, k: (k <= q + 1) & (q - k < 40)])
def test_a_mask_that_shows_later_tokens_is_refused(shown: Any) -> None:
    with pytest.raises(ModelRefused, match="not causal"):
        find((mask(shown), None))


def test_blocks_cap_contexts_in_which_chunks_are_moved() -> None:
    assert cap_by_blocks(LIMIT, [None, Window(30)]) is LIMIT
    capped = cap_by_blocks(LIMIT, [None, Window(30, chunked=True)])
    assert capped.tokens == 30 and "blocks of 30 tokens" in capped.because and "use exact" in capped.because
