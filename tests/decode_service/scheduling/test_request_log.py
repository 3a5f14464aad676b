"""One line for each stage of a request, under its id, with times and counts and no text of anybody's."""

from __future__ import annotations

import logging

import pytest

from decode_service.scheduling import request_log
from decode_service.scheduling.sequence import Failed, Finished, FinishReason
from serving.errors import Overloaded
from serving.trace.request_id import current_request_id
from tests.decode_service.prompts import answered


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str, str]]:
    """Level, request id while it was written, and words of each line."""
    seen: list[tuple[int, str, str]] = []
    caplog.set_level(logging.DEBUG, request_log.log.name)

    class Keep(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            seen.append((record.levelno, current_request_id(), record.getMessage()))
            return True

    caplog.handler.addFilter(Keep())
    return seen


def test_stages_tell_their_times(lines: list[tuple[int, str, str]]) -> None:
    request_log.admitted(answered(), 2)
    request_log.first_token(answered())
    assert lines == [
        (logging.DEBUG, "r-1", "admitted after 3.0 ms; 2 of 3 chunks to fetch"),
        (logging.DEBUG, "r-1", "first token 11.0 ms after its arrival"),
    ]


def test_an_answer_tells_its_tokens(lines: list[tuple[int, str, str]]) -> None:
    request_log.ended(answered(), Finished(FinishReason.STOP))
    ((level, request_id, words),) = lines
    assert (level, request_id) == (logging.INFO, "r-1")
    assert words == (
        "finished (stop) after 19.0 ms, first token after 11.0 ms: 10 prompt tokens, 5 of them cached, 3 generated"
    )


def test_one_without_a_first_token_has_nothing_cached(lines: list[tuple[int, str, str]]) -> None:
    request_log.ended(answered(first_token=False), Finished(FinishReason.ABORT))
    assert "first token after - ms" in lines[0][2] and "0 of them cached, 0 generated" in lines[0][2]


def test_a_failure_is_a_warning_with_its_status(lines: list[tuple[int, str, str]]) -> None:
    request_log.ended(answered(), Failed(Overloaded("no room")))
    assert lines == [(logging.WARNING, "r-1", "failed with RESOURCE_EXHAUSTED after 19.0 ms: no room")]
