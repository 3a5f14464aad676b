"""Why a request is refused or fails, in words that know no transport: a class for what its caller would do about it.

``serving.rpc.errors`` has the gRPC status of each class; another transport would have a table of its own. The words are
all that the caller sees: one line that names the field, what is wrong with it, and the remedy.
"""

from __future__ import annotations

from chunk_store.errors import ClaimLost, StoreError, StoreFull, StoreTooNew, StoreUnavailable
from engine.kv.resident import PoolFull
from serving.trace.printable import printable
from serving.trace.request_id import current_request_id
from text.errors import TextBusy, TextRefused

MESSAGE_CHARACTERS_MAX = 1200
STORE_FULL, STORE_UNAVAILABLE = "STORE_FULL", "STORE_UNAVAILABLE"  # who is told so computes for himself


class RequestError(Exception):
    """A request that is answered with ``message``, ``field: problem; remedy``, instead of a result.

    The message is one line of bounded length, whatever stands in it: what carries it is bounded too.
    ``retry``: the same request may succeed later, after ``retry_after_s`` seconds where that is known. ``reason`` is a
    word for programs, where one acts on it.
    """

    retry: bool = False

    def __init__(
        self, problem: str, *, field: str = "", remedy: str = "", retry_after_s: float | None = None, reason: str = ""
    ) -> None:
        message = f"{field}: {problem}" if field else problem
        message = f"{message}; {remedy}" if remedy else message
        message = printable(message, MESSAGE_CHARACTERS_MAX if message.isascii() else MESSAGE_CHARACTERS_MAX // 3)
        super().__init__(message)
        self.message = message
        self.field = field
        self.remedy = remedy
        self.retry_after_s = retry_after_s
        self.retry = self.retry or retry_after_s is not None
        self.reason = reason


class InvalidRequest(RequestError):
    """It can never work as it is: mend it."""


class TooLarge(RequestError):
    """More bytes than a request may have."""


class NotFound(RequestError):
    """No such chunk, service or request."""


class Conflict(RequestError):
    """It exists already."""


class Unsupported(RequestError):
    """This model, pool or store cannot do it, as they are set up."""


class Overloaded(RequestError):
    """A line, a pool, a quota or the store is full: later, or with less."""


class Unavailable(RequestError):
    """What it takes is not there: starting, shutting down, or away."""

    retry = True


class DeadlineExceeded(RequestError):
    """It took longer than it may."""


class Cancelled(RequestError):
    """Nobody waits for the answer any more."""


class Unauthenticated(RequestError):
    """Who calls is not known here."""


class PermissionDenied(RequestError):
    """Who calls may not do this."""


class InternalFault(RequestError):
    """A fault of ours; the log says which."""


_KNOWN: tuple[tuple[type[Exception], type[RequestError], str], ...] = (
    (StoreUnavailable, Unavailable, STORE_UNAVAILABLE),
    (ClaimLost, Unavailable, ""),
    (StoreTooNew, Unsupported, STORE_UNAVAILABLE),
    (StoreFull, Overloaded, STORE_FULL),
    (PoolFull, Overloaded, ""),
    (TextRefused, InvalidRequest, ""),
    (TextBusy, Overloaded, ""),
    (TimeoutError, DeadlineExceeded, ""),
)


def request_error(error: Exception) -> RequestError:
    """What the caller is told of ``error``, whatever raised it.

    Of what nobody expected, a fault of ours, its kind and not its text, which may quote somebody's prompt.
    """
    if isinstance(error, RequestError):
        return error
    for kind, told, reason in _KNOWN:
        if isinstance(error, kind):
            if isinstance(error, StoreError):
                return told(error.problem or kind.__name__, remedy=error.remedy, reason=reason)
            return told(str(error) or kind.__name__, reason=reason)
    return InternalFault(
        f"internal error ({type(error).__name__}); the service's log has it under request id {current_request_id()}"
    )
