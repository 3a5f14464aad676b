"""What a status says besides its code: as other gRPC libraries write and read it."""

from __future__ import annotations

from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from chunk_store.errors import StoreFull
from serving.errors import STORE_FULL, NotFound, request_error
from serving.rpc.details import DETAILS_KEY, details_metadata, error_reason, retry_after_s
from serving.rpc.errors import error_metadata


def test_what_is_written_is_a_status_with_its_details() -> None:
    written = details_metadata(StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=1.25, reason="WHY")
    ((key, value),) = written
    status, info = status_pb2.Status.FromString(value), error_details_pb2.RetryInfo()
    assert key == DETAILS_KEY and (status.code, status.message) == (8, "full")
    assert status.details[0].Unpack(info) and info.retry_delay.ToTimedelta().total_seconds() == 1.25
    assert (retry_after_s(written), error_reason(written)) == (1.25, "WHY")


def test_what_says_nothing_of_it_is_none() -> None:
    other = status_pb2.Status(code=8)
    other.details.add().Pack(error_details_pb2.QuotaFailure())
    other.details.add().Pack(error_details_pb2.ErrorInfo(reason="THEIRS", domain="elsewhere"))
    for details in (b"\xff\xff", other.SerializeToString()):
        assert retry_after_s(((DETAILS_KEY, details),)) is None
        assert error_reason(((DETAILS_KEY, details),)) == ""
    assert retry_after_s(None) is None and retry_after_s((("x", "y"),)) is None
    assert error_metadata(NotFound("no")) == ()


def test_a_full_store_is_told_from_a_full_queue() -> None:
    full = error_metadata(request_error(StoreFull("no room")))
    assert error_reason(full) == STORE_FULL and retry_after_s(full) is None
