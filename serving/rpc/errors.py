"""From what went wrong to a gRPC status and back: the one table."""

from __future__ import annotations

import grpc
from grpc import StatusCode

from serving import errors
from serving.errors import RequestError
from serving.rpc.details import details_metadata, error_reason, retry_after_s

_STATUS: dict[type[RequestError], StatusCode] = {
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.Conflict: StatusCode.ALREADY_EXISTS,
    errors.Unsupported: StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooLarge: StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: StatusCode.CANCELLED,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: StatusCode.PERMISSION_DENIED,
    errors.InternalFault: StatusCode.INTERNAL,
}
# What a status means that another service gave; CANCELLED is the word of one whose time to drain is over.
_MEANING: dict[StatusCode, type[RequestError]] = {code: kind for kind, code in reversed(_STATUS.items())} | {
    StatusCode.CANCELLED: errors.Unavailable,
    StatusCode.UNIMPLEMENTED: errors.Unsupported,
}
STATUS_NAMES = tuple(code.name for code in StatusCode if code is not StatusCode.OK)


def status_of(error: RequestError) -> StatusCode:
    """The status that a call ends with which ends with ``error``."""
    return _STATUS[type(error)]


def status_name(error: RequestError) -> str:
    """Its status in words, as metrics and logs have it."""
    return status_of(error).name


def status_number(error: RequestError) -> int:
    """Its status as a ``google.rpc.Status`` has it."""
    number: int = status_of(error).value[0]
    return number


def error_metadata(error: RequestError) -> tuple[tuple[str, bytes], ...]:
    """What goes into the trailing metadata beside the status."""
    code = status_of(error)
    return details_metadata(code, error.message, retry_after_s=error.retry_after_s, reason=error.reason)


def error_from_status(error: grpc.RpcError) -> RequestError:
    """What another service said, as it would be said here; InternalFault for a status that none of ours gives."""
    kind, trailing = _MEANING.get(error.code(), errors.InternalFault), error.trailing_metadata()
    return kind(error.details() or "", retry_after_s=retry_after_s(trailing), reason=error_reason(trailing))
