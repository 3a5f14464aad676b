"""When a refused caller may come again: as other gRPC libraries write and read it."""

from __future__ import annotations

from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from serving.errors import RequestError
from serving.retry_info import DETAILS_KEY, retry_after_s, with_retry_info


def test_what_is_written_is_a_status_with_retry_info() -> None:
    ((key, value),) = with_retry_info(StatusCode.RESOURCE_EXHAUSTED, "full", 1.25)
    status, info = status_pb2.Status.FromString(value), error_details_pb2.RetryInfo()
    assert key == DETAILS_KEY and (status.code, status.message) == (8, "full")
    assert status.details[0].Unpack(info) and info.retry_delay.ToTimedelta().total_seconds() == 1.25
    assert retry_after_s(((key, value),)) == 1.25


def test_what_says_nothing_of_it_is_none() -> None:
    other = status_pb2.Status(code=8)
    other.details.add().Pack(error_details_pb2.QuotaFailure())
    for details in (b"\xff\xff", other.SerializeToString()):
        assert retry_after_s(((DETAILS_KEY, details),)) is None
    assert retry_after_s(None) is None and retry_after_s((("x", "y"),)) is None
    assert RequestError(StatusCode.NOT_FOUND, "no").metadata == ()
