"""What a request may carry in all, counted before anything is copied."""

from __future__ import annotations

import pytest

from serving.errors import InvalidRequest
from serving.rpc.field_bounds import (
    ID_CHARACTERS_MAX,
    LABEL_CHARACTERS_MAX,
    ContentBudget,
    check_count,
    check_id,
    check_label,
    check_request_id,
)
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


def test_counts_and_lengths_name_the_field_and_not_the_content() -> None:
    check_count("tags", ["x"] * 3, 3)
    check_label("name", "n" * LABEL_CHARACTERS_MAX)
    check_id("chunk_id", "f" * ID_CHARACTERS_MAX)
    check_request_id("")
    check_request_id("d\u00e9j\u00e0 vu/1")
    for refused, field, said in (
        (lambda: check_count("tags", ["secret"] * 4, 3, "join some"), "tags", "tags: 4 are more than 3; join some"),
        (lambda: check_label("name", "secret" * 99), "name", "name: 594 characters are more than 256; shorten it"),
        (lambda: check_id("chunk_id", "f" * 129), "chunk_id", "chunk_id: 129 characters are more than 128; shorten it"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            refused()
        assert (caught.value.message, caught.value.field) == (said, field)


def test_the_limit_of_a_budget_is_told_in_the_words_it_was_given() -> None:
    budget = ContentBudget(10, "chunk", limit="10 tokens (of 4096: positions are learned)")
    with pytest.raises(InvalidRequest, match=r"a chunk of 11 tokens .* of 10 tokens \(of 4096: .*; send fewer"):
        budget.take_tokens("token_ids", range(11))
    budget.take_text("text", "x")
    assert budget.characters == 1
