"""What a request may carry in all, counted before anything is copied."""

from __future__ import annotations

import pytest

from serving.errors import InvalidRequest
from serving.rpc.field_bounds import ContentBudget, check_request_id
from serving.rpc.parsing import text_nbytes_max


def test_the_budget_of_a_request_counts_before_anything_is_copied() -> None:
    budget = ContentBudget(100)
    budget.take_tokens("segments[0].token_ids", range(60))
    with pytest.raises(InvalidRequest, match=r"segments\[1\].token_ids: a prompt of 101 tokens"):
        budget.take_tokens("segments[1].token_ids", range(41))
    budget = ContentBudget(100)
    budget.take_text("text", "x" * text_nbytes_max(100))
    with pytest.raises(InvalidRequest, match=f"a prompt of {text_nbytes_max(100) + 1} characters"):
        budget.take_text("text", "x")


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31m", "a\u2028b", "a\x00", "\u202eabc", "x" * 257])
def test_request_ids_that_cannot_stand_in_a_log(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request_id(text)
    assert caught.value.message.isprintable() and len(caught.value.message) < 200
