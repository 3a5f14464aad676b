"""What a request fails with, before any transport has a word for it."""

from __future__ import annotations

import inspect

import pytest

from chunk_store.errors import ClaimLost, StoreFull, StoreTooNew, StoreUnavailable
from engine.kv.resident import PoolFull
from serving import errors
from serving.errors import (
    MESSAGE_CHARACTERS_MAX,
    STORE_FULL,
    STORE_UNAVAILABLE,
    InternalFault,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestError,
    Unavailable,
    Unsupported,
    request_error,
)

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, RequestError) and kind is not RequestError
]


def test_words_are_field_problem_and_remedy() -> None:
    assert InvalidRequest("missing").message == "missing"
    assert InvalidRequest("missing", field="text").message == "text: missing"
    told = InvalidRequest("is empty", field="tags[1]", remedy="leave it out")
    assert str(told) == told.message == "tags[1]: is empty; leave it out"
    assert (told.field, told.remedy) == ("tags[1]", "leave it out")


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31m", "x" * 100_000, "\u6f22" * 100_000])
def test_words_are_one_printable_line_of_bounded_length(text: str) -> None:
    message = NotFound(text, field="chunk_id").message
    assert message.isprintable() and len(message.encode()) < 2 * MESSAGE_CHARACTERS_MAX


def test_whether_and_when_to_come_again() -> None:
    assert Unavailable("starting").retry and Unavailable("starting").retry_after_s is None
    assert not Overloaded("full").retry and Overloaded("full", retry_after_s=0.5).retry
    assert not any(kind("so").retry for kind in KINDS if kind is not Unavailable)


@pytest.mark.parametrize(
    ("raised", "told", "reason"),
    [
        (StoreUnavailable("disk gone"), Unavailable, STORE_UNAVAILABLE),
        (ClaimLost("another"), Unavailable, ""),
        (StoreTooNew("format 9"), Unsupported, STORE_UNAVAILABLE),
        (StoreFull("no room"), Overloaded, STORE_FULL),
        (PoolFull("no pages"), Overloaded, ""),
        (TimeoutError(), errors.DeadlineExceeded, ""),
    ],
)
def test_what_other_rooms_raise(raised: Exception, told: type[RequestError], reason: str) -> None:
    found = request_error(raised)
    assert type(found) is told and found.reason == reason
    assert found.message == (str(raised) or type(raised).__name__)


def test_what_nobody_expected_is_our_fault_and_quotes_nobody() -> None:
    found = request_error(KeyError("somebody's prompt"))
    assert type(found) is InternalFault and "KeyError" in found.message and "prompt" not in found.message
    known = NotFound("here")
    assert request_error(known) is known
