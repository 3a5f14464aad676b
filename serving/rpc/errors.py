"""From what went wrong to a gRPC status: one table, and the error that says its own status.

A message names the field and the remedy, because it is all that the caller sees. Which error a service raises
where is not this module's business.
"""

from __future__ import annotations

from grpc import StatusCode

from chunk_store.errors import ClaimLost, StoreFull, StoreTooNew, StoreUnavailable
from engine.kv.resident import PoolFull
from serving.process.logs import current_request_id, printable
from serving.rpc.details import details_metadata
from text.codec import TextRefused

MESSAGE_CHARACTERS_MAX = 1200


class RequestError(Exception):
    """A request that is answered with ``code`` and ``message`` instead of a result.

    The message is one line of bounded length, whatever stands in it: trailing metadata are bounded too.
    ``retry_after_s``: the same request may succeed after so many seconds; None where that is not known. ``reason`` is a
    word for programs, where one acts on it.
    """

    def __init__(self, code: StatusCode, message: str, *, retry_after_s: float | None = None, reason: str = "") -> None:
        message = printable(message, MESSAGE_CHARACTERS_MAX if message.isascii() else MESSAGE_CHARACTERS_MAX // 3)
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.reason = reason

    @property
    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What goes into the trailing metadata beside the status."""
        return details_metadata(self.code, self.message, retry_after_s=self.retry_after_s, reason=self.reason)


STORE_FULL, STORE_UNAVAILABLE = "STORE_FULL", "STORE_UNAVAILABLE"  # who is told so computes for himself
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (StoreUnavailable, STORE_UNAVAILABLE),
    (StoreTooNew, STORE_UNAVAILABLE),
    (StoreFull, STORE_FULL),
)

_STATUS: tuple[tuple[type[Exception], StatusCode], ...] = (
    (StoreUnavailable, StatusCode.UNAVAILABLE),
    (ClaimLost, StatusCode.UNAVAILABLE),
    (StoreTooNew, StatusCode.FAILED_PRECONDITION),
    (StoreFull, StatusCode.RESOURCE_EXHAUSTED),
    (PoolFull, StatusCode.RESOURCE_EXHAUSTED),
    (TextRefused, StatusCode.INVALID_ARGUMENT),
    (TimeoutError, StatusCode.DEADLINE_EXCEEDED),
)


def request_error(error: Exception) -> RequestError | None:
    """The status that ``error`` stands for; None when nobody expected it (a fault of ours)."""
    if isinstance(error, RequestError):
        return error
    for kind, code in _STATUS:
        if isinstance(error, kind):
            reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "")
            return RequestError(code, str(error) or kind.__name__, reason=reason)
    return None


def internal_error(error: Exception) -> RequestError:
    """What the caller is told of a fault of ours: its kind, not its text, which may quote somebody's prompt."""
    return RequestError(
        StatusCode.INTERNAL,
        f"internal error ({type(error).__name__}); the service's log has it under request id {current_request_id()}",
    )
