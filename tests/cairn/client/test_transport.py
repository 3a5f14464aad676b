"""Deadlines, retries and metadata of a call, before any channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from cairn.client.errors import InvalidRequest, Overloaded
from cairn.client.transport import ATTEMPTS_MAX, FIRST_DELAY_S, Attempts, Peer, error_from_rpc
from serving.rpc.details import details_metadata


class Failed(grpc.RpcError):
    def __init__(self, code: StatusCode, retry_after_s: float | None = None) -> None:
        self._code = code
        self._metadata = details_metadata(code, "why", retry_after_s=retry_after_s) if retry_after_s else ()

    def code(self) -> StatusCode:
        return self._code

    def details(self) -> str:
        return "why"

    def trailing_metadata(self) -> Any:
        return self._metadata


def delays(error: Any, *, timeout_s: float = 1000.0, retry: bool = True, wait: bool = True) -> list[float]:
    attempts, found = Attempts(timeout_s, retry, wait), []
    while (delay := attempts.delay_after(error)) is not None:
        found.append(delay)
        assert len(found) < 10
    return found


def test_unavailable_is_tried_again_a_few_times_with_growing_delays() -> None:
    found = delays(Failed(StatusCode.UNAVAILABLE))
    assert len(found) == ATTEMPTS_MAX - 1
    for number, delay in enumerate(found):
        assert FIRST_DELAY_S * 2**number <= delay <= FIRST_DELAY_S * 2**number * 1.5


def test_overload_is_tried_again_when_the_service_says_when() -> None:
    assert delays(Failed(StatusCode.RESOURCE_EXHAUSTED)) == []
    assert all(delay >= 7.0 for delay in delays(Failed(StatusCode.RESOURCE_EXHAUSTED, 7.0)))
    assert delays(Failed(StatusCode.RESOURCE_EXHAUSTED, 7.0), wait=False) == []
    assert delays(Failed(StatusCode.UNAVAILABLE), wait=False), "for others than a full service"


@pytest.mark.parametrize("code", [StatusCode.INTERNAL, StatusCode.DEADLINE_EXCEEDED, StatusCode.INVALID_ARGUMENT])
def test_nothing_else_is_tried_again(code: StatusCode) -> None:
    assert delays(Failed(code)) == []


def test_what_may_not_be_sent_twice_or_would_come_too_late_is_not() -> None:
    assert delays(Failed(StatusCode.UNAVAILABLE), retry=False) == []
    assert delays(Failed(StatusCode.RESOURCE_EXHAUSTED, 7.0), timeout_s=6.0) == []


def test_a_deadline_is_positive_and_never_quite_zero() -> None:
    for timeout_s in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidRequest, match="timeout_s"):
            Attempts(timeout_s, True)
    assert 0 < Attempts(1e-9, True).remaining_s() <= 0.001


def test_metadata_bear_token_and_a_printable_request_id() -> None:
    plain = Peer("decode", "here:1")
    assert plain.metadata == () and plain.source == "decode service at here:1"
    named = Peer("decode", "here:1", token="t").for_request("my id\n")
    assert named.metadata == (("authorization", "Bearer t"), ("x-request-id", "my_id_"))
    first, second = plain.for_request(), plain.for_request()
    assert first.request_id and first.request_id != second.request_id


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tls: cannot read .*absent"):
        Peer("decode", "here:1", tls=tmp_path / "absent").open_channel()


def test_a_failed_call_becomes_an_error_with_its_peer() -> None:
    error = error_from_rpc(Failed(StatusCode.RESOURCE_EXHAUSTED, 2.5), Peer("prefill", "here:1", request_id="r"))
    assert isinstance(error, Overloaded) and error.retry_after_s == 2.5
    assert (error.source, error.request_id, error.message) == ("prefill service at here:1", "r", "why")
