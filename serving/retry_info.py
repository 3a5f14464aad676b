"""``google.rpc.RetryInfo`` in the trailing metadata: when a refused caller may come again. Knows no service of ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

DETAILS_KEY = "grpc-status-details-bin"  # where every gRPC library looks for a google.rpc.Status


def with_retry_info(code: StatusCode, message: str, after_s: float) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata which say that a call refused with ``code`` may be made again after ``after_s`` seconds."""
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(round(after_s * 1000))
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(info)
    return ((DETAILS_KEY, status.SerializeToString()),)


def retry_after_s(trailing: Iterable[Any] | None) -> float | None:
    """Seconds after which a refused call may be made again; None where the trailing metadata say nothing of it.

    ``trailing``: pairs of a key and its text or bytes, as either kind of channel has them.
    """
    for key, value in trailing or ():
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            details = status_pb2.Status.FromString(value).details
            for detail in details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    seconds: float = info.retry_delay.ToMilliseconds() / 1000
                    return max(0.0, seconds)
        except (DecodeError, UnicodeDecodeError):
            continue  # of another service's making
    return None
