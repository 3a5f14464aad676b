"""From what went wrong to a gRPC status: one table, and the error that says its own status.

A message names the field and the remedy, because it is all that the caller sees. Which error a service raises
where is not this module's business.
"""

from __future__ import annotations

from grpc import StatusCode

from chunk_store.store import ClaimLost, StoreFull, StoreTooNew, StoreUnavailable
from engine.resident import PoolFull
from engine.tokenizer import TextRefused
from serving.logs import current_request_id
from serving.retry_info import with_retry_info


class RequestError(Exception):
    """A request that is answered with ``code`` and ``message`` instead of a result.

    ``retry_after_s``: the same request may succeed after so many seconds; None where that is not known.
    """

    def __init__(self, code: StatusCode, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What goes into the trailing metadata beside the status."""
        return () if self.retry_after_s is None else with_retry_info(self.code, self.message, self.retry_after_s)


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
            return RequestError(code, str(error) or kind.__name__)
    return None


def internal_error(error: Exception) -> RequestError:
    """What the caller is told of a fault of ours: its kind, not its text, which may quote somebody's prompt."""
    return RequestError(
        StatusCode.INTERNAL,
        f"internal error ({type(error).__name__}); the service's log has it under request id {current_request_id()}",
    )
