"""What a status says besides its code: when to come again (``RetryInfo``) and a word for programs (``ErrorInfo``).

They travel in the trailing metadata as gRPC's rich error model has it. Knows no service of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

DETAILS_KEY = "grpc-status-details-bin"  # where every gRPC library looks for a google.rpc.Status
DOMAIN = "cairn"


def details_metadata(
    code: StatusCode, message: str, *, retry_after_s: float | None = None, reason: str = ""
) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata of a call that ends with ``code``; empty when there is nothing to say."""
    details: list[Message] = []
    if retry_after_s is not None:
        info = RetryInfo()
        info.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        details.append(info)
    if reason:
        details.append(ErrorInfo(reason=reason, domain=DOMAIN))
    if not details:
        return ()
    status = Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return ((DETAILS_KEY, status.SerializeToString()),)


def retry_after_s(trailing: Iterable[Any] | None) -> float | None:
    """Seconds after which a refused call may be made again; None where the trailing metadata say nothing of it.

    ``trailing``: pairs of a key and its text or bytes, as either kind of channel has them.
    """
    info = RetryInfo()
    if not _unpack(trailing, info):
        return None
    seconds: float = info.retry_delay.ToMilliseconds() / 1000
    return max(0.0, seconds)


def error_reason(trailing: Iterable[Any] | None) -> str:
    """The reason that a service of ours gave with its status, such as ``STORE_FULL``; "" without one."""
    info = ErrorInfo()
    return str(info.reason) if _unpack(trailing, info) and info.domain == DOMAIN else ""


def _unpack(trailing: Iterable[Any] | None, into: Message) -> bool:
    """Whether the metadata hold a detail of the kind of ``into``, which is then filled."""
    for key, value in trailing or ():
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            if any(detail.Unpack(into) for detail in Status.FromString(value).details):
                return True
        except (DecodeError, UnicodeDecodeError):
            continue  # of another service's making
    return False
